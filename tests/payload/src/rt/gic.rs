//! As much of a GICv3 as it takes for a timer interrupt or one of another CPU to wake this one, or to end the run of a
//! vCPU. Interrupts stay masked.

use core::ptr;

use crate::rt::{
    cpu::{instruction, read_register, write_register},
    platform::platform,
};

/// Interrupt of the EL1 virtual timer, a PPI.
const VIRTUAL_TIMER: u32 = 27;

/// Interrupts that the hypervisor handles while a vCPU runs: maintenance of the GIC, and the EL2 timer. PPIs.
const HYPERVISOR: u32 = 1 << 25 | 1 << 26;

/// The interrupt that [`send`] sends, an SGI.
pub(crate) const SGI: u32 = 1;

#[expect(unsafe_code, reason = "device registers")]
fn write(address: u64, value: u32) {
    let register = ptr::with_exposed_provenance_mut::<u32>(address as usize);
    // SAFETY: A register of the GIC, which stage 1 maps as Device.
    unsafe { register.write_volatile(value) }
}

/// Reads a GIC register.
#[expect(unsafe_code, reason = "device registers")]
pub(crate) fn read(address: u64) -> u32 {
    let register = ptr::with_exposed_provenance::<u32>(address as usize);
    // SAFETY: A register of the GIC, which stage 1 maps as Device.
    unsafe { register.read_volatile() }
}

/// Lets interrupts of this CPU's virtual timer reach it. `cpu` is its number.
pub(crate) fn prepare(cpu: usize) {
    let Some([distributor, redistributors]) = platform().gic else { return };
    write(distributor.start, 0x13); // both groups on, affinity routing
    let frame = redistributors.start + cpu as u64 * 0x2_0000;
    write(frame + 0x14, 0); // GICR_WAKER: awake
    while read(frame + 0x14) & 4 != 0 {
        core::hint::spin_loop();
    }
    let ppis = frame + 0x1_0000;
    write(ppis + 0x80, 0xFFFF_FFFF); // GICR_IGROUPR0: group 1
    write(ppis + 0x400 + u64::from(VIRTUAL_TIMER / 4 * 4), 0x8080_8080); // GICR_IPRIORITYR
    write(ppis + 0x400, 0x8080_8080);
    write(ppis + 0x100, 1 << VIRTUAL_TIMER | HYPERVISOR | 1 << SGI); // GICR_ISENABLER0
    write_register!("s3_0_c12_c12_5", read_register!("s3_0_c12_c12_5") | 1); // ICC_SRE_EL1.SRE
    write_register!("s3_0_c4_c6_0", 0xFF); // ICC_PMR_EL1
    write_register!("s3_0_c12_c12_7", 1); // ICC_IGRPEN1_EL1
}

/// Sends [`SGI`] to a CPU.
pub(crate) fn send(cpu: usize) {
    let affinity = platform().cpus[cpu];
    let [aff0, aff1, aff2, _, aff3, ..] = affinity.to_le_bytes().map(u64::from);
    instruction!("dsb ish");
    // ICC_SGI1R_EL1
    let target = aff3 << 48 | aff2 << 32 | aff1 << 16 | 1 << aff0;
    write_register!("s3_0_c12_c11_5", target | u64::from(SGI) << 24);
}

/// Takes the interrupt of the highest priority that is pending, and ends it. 1023 if there is none.
pub(crate) fn take() -> u64 {
    let intid = read_register!("s3_0_c12_c12_0"); // ICC_IAR1_EL1
    if intid < 1020 {
        write_register!("s3_0_c12_c12_1", intid); // ICC_EOIR1_EL1
    }
    intid
}

/// Lets this CPU's virtual timer fire in `ticks` of the counter.
pub(crate) fn arm_timer(ticks: u64) {
    // The other way to set it is good for 31 bits, a few seconds.
    write_register!("cntv_cval_el0", read_register!("cntvct_el0") + ticks);
    write_register!("cntv_ctl_el0", 1);
}

/// Whether the virtual timer has fired.
pub(crate) fn timer_fired() -> bool {
    read_register!("cntv_ctl_el0") & 4 != 0
}

/// Turns the virtual timer off.
pub(crate) fn stop_timer() {
    write_register!("cntv_ctl_el0", 0);
}

/// Waits for some 200 microseconds without keeping the machine busy: an emulator has fewer CPUs than it emulates.
pub(crate) fn nap() {
    if platform().gic.is_none() {
        return instruction!("yield");
    }
    arm_timer(read_register!("cntfrq_el0") / 5000);
    instruction!("wfi");
    stop_timer();
}
