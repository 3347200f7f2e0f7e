//! The guest's device tree.

use anyhow::Result;
use vm_fdt::FdtWriter;

use crate::layout::{
    DEVICE_SIZE, GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE, GIC_REDISTRIBUTOR_SIZE, GIC_REDISTRIBUTORS, RAM, SERIAL,
    SERIAL_SPI, VIRTIO, VIRTIO_SPI,
};

/// What the device tree depends on.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Bytes of RAM.
    pub ram: u64,
    /// MPIDR of each vCPU, affinity fields alone.
    pub cpus: &'a [u64],
    /// Whether the guest calls PSCI by SMC, not HVC.
    pub smc: bool,
    /// Number of virtio devices.
    pub virtio: usize,
    /// The kernel's command line.
    pub bootargs: &'a str,
    /// Start and length of the initrd.
    pub initrd: Option<(u64, u64)>,
    /// Entropy for the kernel's random number generator and for its address layout.
    pub seed: Option<[u8; 64]>,
}

const GIC: u32 = 1;
const CLOCK: u32 = 2;

/// Kinds of interrupts in the bindings of the GICv3.
const SPI: u32 = 0;
const PPI: u32 = 1;
/// Triggers in the same.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Rate of the serial port's clock: 16 times 115200 baud.
const SERIAL_CLOCK: u32 = 1_843_200;

/// Builds the device tree.
pub fn build(machine: &Machine<'_>) -> Result<Vec<u8>> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC)?;

    chosen(&mut fdt, machine)?;

    let memory = fdt.begin_node(&format!("memory@{RAM:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM, machine.ram])?;
    fdt.end_node(memory)?;

    cpus(&mut fdt, machine)?;

    let psci = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    fdt.property_string("method", if machine.smc { "smc" } else { "hvc" })?;
    fdt.end_node(psci)?;

    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    // Secure, non-secure, virtual, and that of EL2.
    let interrupts = [13, 14, 11, 10].map(|number| [PPI, number, LEVEL_HIGH]);
    fdt.property_array_u32("interrupts", interrupts.as_flattened())?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)?;

    interrupt_controller(&mut fdt, machine)?;

    let clock = fdt.begin_node("serial-clock")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", SERIAL_CLOCK)?;
    fdt.property_phandle(CLOCK)?;
    fdt.end_node(clock)?;

    let serial = fdt.begin_node(&format!("serial@{SERIAL:x}"))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[SERIAL, DEVICE_SIZE])?;
    fdt.property_u32("clock-frequency", SERIAL_CLOCK)?;
    fdt.property_u32("clocks", CLOCK)?;
    // irqfds make pulses.
    fdt.property_array_u32("interrupts", &[SPI, SERIAL_SPI, EDGE_RISING])?;
    fdt.end_node(serial)?;

    for (address, spi) in virtio_devices(machine.virtio) {
        let node = fdt.begin_node(&format!("virtio_mmio@{address:x}"))?;
        fdt.property_string("compatible", "virtio,mmio")?;
        fdt.property_array_u64("reg", &[address, DEVICE_SIZE])?;
        fdt.property_array_u32("interrupts", &[SPI, spi, EDGE_RISING])?;
        fdt.property_null("dma-coherent")?;
        fdt.end_node(node)?;
    }

    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

/// Address and SPI of each virtio device.
pub fn virtio_devices(number: usize) -> impl Iterator<Item = (u64, u32)> {
    (VIRTIO..).step_by(DEVICE_SIZE as usize).zip(VIRTIO_SPI..).take(number)
}

fn chosen(fdt: &mut FdtWriter, machine: &Machine<'_>) -> Result<()> {
    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", machine.bootargs)?;
    fdt.property_string("stdout-path", &format!("/serial@{SERIAL:x}"))?;
    if let Some((start, length)) = machine.initrd {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", start + length)?;
    }
    if let Some((kaslr, rng)) = machine.seed.as_ref().map(|seed| seed.split_at(8)) {
        fdt.property("kaslr-seed", kaslr)?;
        fdt.property("rng-seed", rng)?;
    }
    fdt.end_node(chosen)?;
    Ok(())
}

fn cpus(fdt: &mut FdtWriter, machine: &Machine<'_>) -> Result<()> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for mpidr in machine.cpus {
        let cpu = fdt.begin_node(&format!("cpu@{mpidr:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", *mpidr)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)?;
    Ok(())
}

fn interrupt_controller(fdt: &mut FdtWriter, machine: &Machine<'_>) -> Result<()> {
    let gic = fdt.begin_node(&format!("interrupt-controller@{GIC_DISTRIBUTOR:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    let redistributors = GIC_REDISTRIBUTOR_SIZE * machine.cpus.len() as u64;
    fdt.property_array_u64("reg", &[GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE, GIC_REDISTRIBUTORS, redistributors])?;
    fdt.property_phandle(GIC)?;
    fdt.end_node(gic)?;
    Ok(())
}

/// MPIDR of the vCPU with this index, as KVM and Ravelin number them: 16 to a cluster.
pub fn mpidr(index: u32) -> u64 {
    u64::from(index % 16) | u64::from(index / 16) << 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtoolkit::fdt::Fdt;
    use dtoolkit::{Node, Property};

    fn machine() -> Machine<'static> {
        Machine {
            ram: 512 << 20,
            cpus: &[0, 1],
            smc: true,
            virtio: 2,
            bootargs: "console=ttyS0",
            initrd: Some((0x4400_0000, 0x1234)),
            seed: None,
        }
    }

    #[test]
    fn the_tree_is_what_was_asked_for() {
        let bytes = build(&machine()).unwrap();
        let fdt = Fdt::new(&bytes).unwrap();
        let value = |path: &str, name: &str| fdt.find_node(path).unwrap().property(name).unwrap().value().to_vec();
        assert_eq!(value("/chosen", "bootargs"), b"console=ttyS0\0");
        assert_eq!(value("/psci", "method"), b"smc\0");
        assert_eq!(value("/serial@a000000", "compatible"), b"ns16550a\0");
        assert_eq!(
            value("/memory@40000000", "reg"),
            [0x4000_0000u64.to_be_bytes(), (512u64 << 20).to_be_bytes()].concat()
        );
        assert_eq!(value("/chosen", "linux,initrd-end"), 0x4400_1234u64.to_be_bytes());
        assert_eq!(value("/virtio_mmio@a011000", "interrupts"), [0u32, 2, 1].map(u32::to_be_bytes).concat());
        assert!(fdt.find_node("/virtio_mmio@a012000").is_none());
        assert!(fdt.find_node("/cpus/cpu@1").is_some());
        let redistributors = &value("/interrupt-controller@8000000", "reg")[24..];
        assert_eq!(redistributors, 0x4_0000u64.to_be_bytes());
    }

    #[test]
    fn a_protected_guest_gets_the_same_tree_each_time() {
        assert_eq!(build(&machine()).unwrap(), build(&machine()).unwrap());
    }

    #[test]
    fn mpidr_has_16_to_a_cluster() {
        assert_eq!([mpidr(0), mpidr(15), mpidr(16), mpidr(35)], [0, 15, 0x100, 0x203]);
    }
}
