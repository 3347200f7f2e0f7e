//! Interrupts that the host raises, and doorbells that the guest rings.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_IRQFD_FLAG_DEASSIGN,
    KVM_VGIC_V3_ADDR_TYPE_DIST, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_ioeventfd,
    kvm_irq_level, kvm_irqfd, kvm_msi,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::cases;
use crate::check::{Outcome, check_eq, fails, skip, works};
use crate::gic;
use crate::guest::{self, Guest, snippets};
use crate::host::{self, sleep_ms};
use crate::kvm::{self, Exit, KINDS, Kind, Vm, ioctl_with};
use crate::machine::{MEMORY, Machine, Plan};

cases! {
    gic_device[KINDS];
    gic_device_errors[KINDS];
    line[KINDS];
    line_before_boot[KINDS];
    lines_from_many_threads[KINDS];
    line_errors[KINDS];
    irqfd[KINDS];
    irqfd_errors[KINDS];
    msi[KINDS];
    ioeventfd[KINDS];
    ioeventfd_errors[KINDS];
    eventfds_of_a_vm_that_is_closed[KINDS];
    wakes_a_vcpu_that_waits[KINDS];
}

/// Where a doorbell is.
pub(super) const DOORBELL: u64 = 0x0a00_1000;

/// `KVM_IOEVENTFD`'s flags.
const DATAMATCH: u32 = 1 << 0;
const PIO: u32 = 1 << 1;
const DEASSIGN: u32 = 1 << 2;

snippets! {
    /// Stores 1, 2, 4 and 8 bytes: x0 = address, x1 = value.
    store8: "strb w1, [x0]";
    store16: "strh w1, [x0]";
    store32: "str w1, [x0]";
}

fn gic_device(kind: Kind) -> Outcome {
    const TEST: u32 = 1;
    const DEVICE_TYPE: u32 = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3;
    let vm = Vm::new(kind)?;
    let mut arguments = kvm_bindings::kvm_create_device { type_: DEVICE_TYPE, fd: 77, flags: TEST };
    works("KVM_CREATE_DEVICE, test only", ioctl_with(&vm, kvm::CREATE_DEVICE, &mut arguments))?;
    let device = works("KVM_CREATE_DEVICE", vm.create_device(DEVICE_TYPE, 0))?;
    fails("a second one", vm.create_device(DEVICE_TYPE, 0).map(drop), Errno::EEXIST)?;
    let has = |group, attr| {
        ioctl_with(&device, kvm::HAS_DEVICE_ATTR, &mut kvm_device_attr { flags: 0, group, attr, addr: 0 })
    };
    works("the address of the distributor", has(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST.into()))?;
    works("initialisation", has(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into()))?;
    fails("a group that does not exist", has(1000, 0), Errno::ENXIO)
}

fn gic_device_errors(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    for device in [0, 1, 1000, u32::MAX] {
        let result = vm.create_device(device, 0).map(drop);
        fails(format_args!("device {device}"), result, Errno::ENODEV)?;
    }
    let gic = works("KVM_CREATE_DEVICE", vm.create_device(kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, 0))?;
    let set = |mut address: u64| {
        let pointer = (&raw mut address).addr() as u64;
        kvm::set_attribute(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST.into(), pointer)
    };
    fails("an address that is not aligned", set(gic::DISTRIBUTOR + 0x1000), Errno::EINVAL)?;
    fails("an address beyond the guest's", set(1 << kvm::IPA_BITS), Errno::E2BIG)?;
    let nowhere = kvm::set_attribute(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST.into(), 0);
    fails("an address from nowhere", nowhere, Errno::EFAULT)?;
    works("an address", set(gic::DISTRIBUTOR))?;
    fails("another address", set(gic::DISTRIBUTOR + 0x10_0000), Errno::EEXIST)
}

/// A machine whose guest is ready for interrupts.
fn prepared(machine: &Machine, edge: bool) -> Outcome<Guest<'_>> {
    let mut guest = machine.boot()?;
    gic::prepare(&mut guest, edge)?;
    Ok(guest)
}

/// The interrupt that the guest takes now.
fn taken(guest: &mut Guest<'_>) -> Outcome<u64> {
    Ok(guest.run(gic::take(), &[])?[0])
}

/// What the guest takes if there is nothing.
const NOTHING: u64 = 1023;

fn line(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = prepared(&machine, false)?;
    check_eq!(taken(&mut guest)?, NOTHING, "before");
    for intid in [32, 40, 63] {
        works("up", machine.vm.set_spi(intid, true))?;
        // A level stays until it falls.
        check_eq!([taken(&mut guest)?, taken(&mut guest)?], [u64::from(intid); 2], "while it is up");
        works("down", machine.vm.set_spi(intid, false))?;
        check_eq!(taken(&mut guest)?, NOTHING, "when it is down");
    }
    Ok(())
}

fn line_before_boot(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    works("up", machine.vm.set_spi(33, true))?;
    works("up", machine.vm.set_spi(34, true))?;
    works("down", machine.vm.set_spi(34, false))?;
    let mut guest = prepared(&machine, false)?;
    check_eq!(taken(&mut guest)?, 33, "the one that is up");
    works("down", machine.vm.set_spi(33, false))?;
    check_eq!(taken(&mut guest)?, NOTHING, "the one that is down");
    Ok(())
}

/// Threads on all CPUs interrupt one vCPU, and so the CPU that it is on, as fast as they can.
fn lines_from_many_threads(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 4).build()?;
    let mut guest = prepared(&machine, false)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        let (machine, stop) = (&machine, &stop);
        let change = move |intid| -> Outcome {
            while !stop.load(Ordering::Relaxed) {
                works("up", machine.vm.set_spi(intid, true))?;
                works("down", machine.vm.set_spi(intid, false))?;
            }
            Ok(())
        };
        let threads = [32, 40, 48, 63].map(|intid| scope.spawn(move || change(intid)));
        let result = (0..50).try_for_each(|seed| {
            guest.fill(MEMORY, 4, 0, seed)?;
            guest.check(MEMORY, 4, 0, seed)
        });
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        result
    })?;
    check_eq!(taken(&mut guest)?, NOTHING, "when all are down");
    works("up", machine.vm.set_spi(33, true))?;
    check_eq!(taken(&mut guest)?, 33, "the one that is up");
    Ok(())
}

fn line_errors(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let line = |irq: u32| {
        let mut arguments = kvm_irq_level { level: 1, ..Default::default() };
        arguments.__bindgen_anon_1.irq = irq;
        ioctl_with(&machine.vm, kvm::IRQ_LINE, &mut arguments)
    };
    const SPI: u32 = 1 << 24;
    for irq in [SPI, SPI | 31, SPI | 1020, SPI | 0xffff, 3 << 24 | 32, 15 << 24] {
        fails(format_args!("interrupt {irq:#x}"), line(irq), Errno::EINVAL)?;
    }
    Ok(())
}

/// `KVM_IRQFD` of a number of an SPI, less 32.
fn set_irqfd(vm: &Vm, event: &EventFd, gsi: u32, flags: u32) -> Result<i32, Errno> {
    let fd = event.as_raw_fd().cast_unsigned();
    ioctl_with(vm, kvm::IRQFD, &mut kvm_irqfd { fd, gsi, flags, ..Default::default() })
}

pub(super) fn event() -> Outcome<EventFd> {
    works("eventfd", EventFd::from_flags(EfdFlags::EFD_NONBLOCK))
}

fn irqfd(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let event = event()?;
    works("KVM_IRQFD", set_irqfd(&machine.vm, &event, 5, 0))?;
    let mut guest = prepared(&machine, true)?;
    for _ in 0..10 {
        works("write", event.write(1))?;
        let mut seen = NOTHING;
        host::wait_until("the interrupt", Duration::from_secs(10), || {
            seen = taken(&mut guest)?;
            Ok(seen != NOTHING)
        })?;
        check_eq!([seen, taken(&mut guest)?], [37, NOTHING], "an edge is one interrupt");
    }
    works("taken away", set_irqfd(&machine.vm, &event, 5, KVM_IRQFD_FLAG_DEASSIGN))?;
    works("write", event.write(1))?;
    sleep_ms(20);
    check_eq!(taken(&mut guest)?, NOTHING, "after it was taken away");
    Ok(())
}

fn irqfd_errors(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let (one, other) = (event()?, event()?);
    works("KVM_IRQFD", set_irqfd(&machine.vm, &one, 5, 0))?;
    fails("the same again", set_irqfd(&machine.vm, &one, 5, 0), Errno::EBUSY)?;
    works("another event for it", set_irqfd(&machine.vm, &other, 5, 0))?;
    fails("an unknown flag", set_irqfd(&machine.vm, &other, 6, 1 << 5), Errno::EINVAL)?;
    let mut bad = kvm_irqfd { fd: 1000, gsi: 5, ..Default::default() };
    fails("a file that is not open", ioctl_with(&machine.vm, kvm::IRQFD, &mut bad), Errno::EBADF)?;
    bad.fd = machine.vm.fd.as_raw_fd().cast_unsigned();
    fails("a file of another kind", ioctl_with(&machine.vm, kvm::IRQFD, &mut bad), Errno::EINVAL)?;
    // An event that is closed while it is in use.
    drop(other);
    works("write", one.write(1))?;
    machine.boot().map(drop)
}

fn msi(kind: Kind) -> Outcome {
    if !kvm::is_ravelin() {
        skip!("messages of this KVM need an ITS");
    }
    let machine = Plan::new(kind, 1).build()?;
    let mut guest = prepared(&machine, true)?;
    let address = gic::DISTRIBUTOR + gic::SETSPI;
    let send = |address: u64, data: u32| {
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        let mut message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        ioctl_with(&machine.vm, kvm::SIGNAL_MSI, &mut message)
    };
    for intid in [32, 50] {
        let sent = works("KVM_SIGNAL_MSI", send(address, intid))?;
        anyhow::ensure!(sent > 0, "KVM_SIGNAL_MSI: {sent}");
        check_eq!([taken(&mut guest)?, taken(&mut guest)?], [u64::from(intid), NOTHING], "the interrupt");
    }
    for (address, data) in [(address + 4, 40), (0, 40), (address, 31), (address, 2000)] {
        let sent = send(address, data);
        anyhow::ensure!(sent.is_err() || sent == Ok(0), "a message {data} to {address:#x}: {sent:?}");
    }
    check_eq!(taken(&mut guest)?, NOTHING, "afterwards");
    Ok(())
}

/// `KVM_IOEVENTFD`.
pub(super) fn set_doorbell(
    vm: &Vm,
    event: &EventFd,
    addr: u64,
    len: u32,
    datamatch: u64,
    flags: u32,
) -> Result<i32, Errno> {
    let fd = event.as_raw_fd();
    ioctl_with(vm, kvm::IOEVENTFD, &mut kvm_ioeventfd { datamatch, addr, len, fd, flags, ..Default::default() })
}

fn ioeventfd(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let (vm, any, seven, four) = (&machine.vm, event()?, event()?, event()?);
    works("any store", set_doorbell(vm, &any, DOORBELL, 0, 0, 0))?;
    works("stores of 7", set_doorbell(vm, &seven, DOORBELL + 8, 4, 7, DATAMATCH))?;
    works("stores of 4 bytes", set_doorbell(vm, &four, DOORBELL + 16, 4, 0, 0))?;
    let mut guest = machine.boot()?;
    let count = |event: &EventFd| event.read().unwrap_or(0);
    let at = kind.shared(DOORBELL);
    // No exit to this process.
    for code in [store8(), store16(), store32(), guest::store()] {
        guest.run(code, &[at, 99])?;
    }
    check_eq!(count(&any), 4, "rings of the first");
    guest.run(store32(), &[at + 8, 7])?;
    guest.run(store32(), &[at + 16, 1234])?;
    check_eq!([count(&seven), count(&four)], [1, 1], "rings of the others");
    // What does not match exits.
    for (code, offset, size, value) in
        [(store32(), 8, 4, 8), (store16(), 8, 2, 7), (guest::store(), 16, 8, 1), (store32(), 24, 4, 7)]
    {
        guest.begin_code(code, &[at + offset, value])?;
        let store = Exit::Mmio { address: DOORBELL + offset, size, write: true, value };
        check_eq!(guest.exit()?, store, "a store that does not match");
        guest.finish()?;
    }
    // A load of it, too.
    guest.begin_code(guest::load(), &[at])?;
    check_eq!(guest.exit()?, Exit::Mmio { address: DOORBELL, size: 8, write: false, value: 0 }, "a load");
    guest.vcpu.answer(5)?;
    check_eq!(guest.finish()?.x[0], 5, "what the guest loads");
    works("taken away", set_doorbell(vm, &any, DOORBELL, 0, 0, DEASSIGN))?;
    guest.begin_code(guest::store(), &[at, 99])?;
    check_eq!(guest.exit()?, Exit::Mmio { address: DOORBELL, size: 8, write: true, value: 99 }, "after that");
    guest.finish()?;
    check_eq!([count(&any), count(&seven), count(&four)], [0; 3], "rings afterwards");
    Ok(())
}

fn ioeventfd_errors(kind: Kind) -> Outcome {
    let vm = Vm::new(kind)?;
    let event = event()?;
    works("a doorbell", set_doorbell(&vm, &event, DOORBELL, 4, 0, 0))?;
    fails("the same again", set_doorbell(&vm, &event, DOORBELL, 4, 0, 0), Errno::EEXIST)?;
    for len in [3, 5, 7, 9, 16, u32::MAX] {
        fails(format_args!("{len} bytes"), set_doorbell(&vm, &event, DOORBELL + 64, len, 0, 0), Errno::EINVAL)?;
    }
    fails("wrapping around", set_doorbell(&vm, &event, u64::MAX - 1, 8, 0, 0), Errno::EINVAL)?;
    fails("an unknown flag", set_doorbell(&vm, &event, DOORBELL + 64, 4, 0, 1 << 9), Errno::EINVAL)?;
    if kvm::is_ravelin() {
        fails("a port", set_doorbell(&vm, &event, DOORBELL + 64, 4, 0, PIO), Errno::EINVAL)?;
    }
    fails("what is not there", set_doorbell(&vm, &event, DOORBELL + 64, 4, 0, DEASSIGN), Errno::ENOENT)?;
    works("taken away", set_doorbell(&vm, &event, DOORBELL, 4, 0, DEASSIGN))?;
    fails("taken away again", set_doorbell(&vm, &event, DOORBELL, 4, 0, DEASSIGN), Errno::ENOENT)
}

/// Events that outlive their VM do nothing then.
fn eventfds_of_a_vm_that_is_closed(kind: Kind) -> Outcome {
    for _ in 0..5 {
        let (interrupt, doorbell) = (event()?, event()?);
        let machine = Plan::new(kind, 1).build()?;
        works("KVM_IRQFD", set_irqfd(&machine.vm, &interrupt, 5, 0))?;
        works("KVM_IOEVENTFD", set_doorbell(&machine.vm, &doorbell, DOORBELL, 4, 0, 0))?;
        machine.boot()?.store(MEMORY, 1)?;
        drop(machine);
        works("write", interrupt.write(1))?;
        works("write", doorbell.write(1))?;
    }
    Ok(())
}

/// By each way to raise an interrupt.
fn wakes_a_vcpu_that_waits(kind: Kind) -> Outcome {
    let machine = Plan::new(kind, 1).build()?;
    let event = event()?;
    works("KVM_IRQFD", set_irqfd(&machine.vm, &event, 20, 0))?;
    let mut guest = prepared(&machine, true)?;
    for round in 0..20_u64 {
        guest.begin_code(gic::wait(), &[])?;
        let expected = if round % 2 == 0 { 52 } else { 53 };
        std::thread::scope(|scope| -> Outcome {
            let (machine, event) = (&machine, &event);
            let raiser = scope.spawn(move || -> Outcome {
                sleep_ms(round * 3);
                if round % 2 == 0 {
                    works("write", event.write(1)).map(drop)
                } else {
                    works("up", machine.vm.set_spi(53, true))?;
                    works("down", machine.vm.set_spi(53, false)).map(drop)
                }
            });
            check_eq!(guest.finish()?.x[0], expected, "the interrupt");
            raiser.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
        })?;
    }
    // The guest rings, and a thread that polls sees it.
    let doorbell = self::event()?;
    works("KVM_IOEVENTFD", set_doorbell(&machine.vm, &doorbell, DOORBELL, 4, 0, 0))?;
    guest.run(store32(), &[kind.shared(DOORBELL), 1])?;
    let mut files = [PollFd::new(std::os::fd::AsFd::as_fd(&doorbell), PollFlags::POLLIN)];
    check_eq!(poll(&mut files, PollTimeout::from(1000_u16)), Ok(1), "poll");
    Ok(())
}
