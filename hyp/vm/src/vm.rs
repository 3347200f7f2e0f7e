//! VMs and their lives.
//!
//! A VM is *created* and gets tables, vCPUs and memory; *sealed*, from when on it can run; and *dying*, when its memory and
//! then all that the host has donated for it go back to the host. Each step holds the lock of the VM's slot: those that end
//! a stage alone, all others together with the CPUs that run vCPUs, so that none of them ever sees a stage end.

use core::mem::size_of;

use ravelin_abi::{MAX_TAKE_BACK_PAGES, Status, VmAttributes};
use ravelin_memory::{IpaRange, PAGE_SIZE, PhysAddr, PhysRange};
use ravelin_ownership::GuestPage;
use ravelin_sync::{
    Mutex, TicketMutex,
    atomic::{
        AtomicBool, AtomicU8, AtomicU64,
        Ordering::{Relaxed, SeqCst},
        fence,
    },
};
use ravelin_vgic::{Frame, Gic, Spi, VcpuGic, VcpuSet};

use crate::{
    Guest, Handle, ObjectMemory, Power, Refusal, Transitions,
    gic::{GicFrames, SPIS, VcpuGics, VmGic},
    measurement::{Measurement, Measurements, Seal},
    table::Table,
};

/// A vCPU.
pub struct Vcpu<V> {
    /// Its state.
    pub state: V,
    index: usize,
    run_page: PhysAddr,
    metadata: PhysRange,
}

impl<V> Vcpu<V> {
    /// Returns which vCPU of its VM it is.
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Returns the page, mapped writable in the EL2 stage 1, through which the host runs the vCPU.
    pub const fn run_page(&self) -> PhysAddr {
        self.run_page
    }
}

/// What a vCPU is made of.
#[derive(Clone, Copy, Debug)]
pub struct VcpuPages {
    /// Pages that the host donates.
    pub metadata: PhysRange,
    /// How many of them, the last ones, its state has besides.
    pub area: u64,
    /// The run page, which stays the host's.
    pub run_page: PhysAddr,
}

impl VcpuPages {
    /// Cuts what is donated into the pages of the object and those that its state has besides. `None` unless it has the right
    /// size, and at address 0, where no object can be.
    fn cut<V>(&self) -> Option<(PhysRange, PhysRange)> {
        let object = PhysRange::new(self.metadata.base().raw(), pages_for::<Vcpu<V>>(1)).ok()?;
        let area = PhysRange::new(object.end(), self.area).ok()?;
        (area.end() == self.metadata.end() && object.base().raw() != 0).then_some((object, area))
    }
}

/// Place for a vCPU.
struct VcpuSlot<B> {
    /// Set once there is one, for those who do not hold the lock. They come after the seal, which is alone with the VM, and so
    /// after whoever has set it.
    exists: AtomicBool,
    power: Power,
    /// The vCPU, if it exists. Who runs it holds the lock.
    vcpu: Mutex<Option<B>>,
}

// By hand, because a derive would ask the same of the box.
impl<B> Default for VcpuSlot<B> {
    fn default() -> Self {
        Self { exists: AtomicBool::new(false), power: Power::off(), vcpu: Mutex::new(None) }
    }
}

type VcpuSlots<O, V> = <O as ObjectMemory>::Slice<VcpuSlot<<O as ObjectMemory>::Box<Vcpu<V>>>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Created,
    Sealed,
    Dying,
}

/// How a guest ends its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmEnd {
    /// For good.
    Off,
    /// To start anew.
    Reset,
}

const RUNS: u8 = 0;
const OFF: u8 = 1;
const RESET: u8 = 2;

/// A VM.
pub struct Vm<O: ObjectMemory, G: Send + Sync, V: Send + Sync> {
    handle: Handle,
    stage: Stage,
    guest: Guest<G>,
    /// Until it is sealed, or until a page could not be read. Who adds to it holds the lock while pages become the guest's, so
    /// that their order is that of the measurement.
    measurement: Mutex<Option<Measurement>>,
    vcpus: VcpuSlots<O, V>,
    /// Everybody gets their turn: the host takes it too, and vCPUs of the guest as often as they like.
    gic: TicketMutex<VmGic<O>>,
    /// How often something has been done to it that may concern any vCPU.
    gic_changes: AtomicU64,
    /// Since it is sealed.
    gic_frames: Option<GicFrames>,
    /// How the guest has ended it.
    end: AtomicU8,
    /// CNTVOFF_EL2 of all vCPUs.
    counter_offset: AtomicU64,
    metadata: PhysRange,
}

/// How a VM starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Guest address of the first instruction of vCPU 0.
    pub entry: u64,
    /// Guest address of the device tree, which is in its x0.
    pub device_tree: u64,
    /// Guest address of the interrupt controller's distributor.
    pub distributor: u64,
    /// Guest address of the redistributors.
    pub redistributors: u64,
}

impl<O: ObjectMemory, G: Send + Sync, V: Send + Sync> Vm<O, G, V> {
    /// Returns the VM's handle.
    pub const fn handle(&self) -> Handle {
        self.handle
    }

    /// Returns what the guest's calls work on.
    pub const fn guest(&self) -> &Guest<G> {
        &self.guest
    }

    /// Returns whether a vCPU is on, if it exists.
    pub fn power(&self, vcpu: usize) -> Option<&Power> {
        self.vcpus.get(vcpu).filter(|slot| slot.exists.load(Relaxed)).map(|slot| &slot.power)
    }

    /// Returns how the guest has ended the VM, if it has.
    pub(crate) fn end(&self) -> Option<VmEnd> {
        match self.end.load(Relaxed) {
            RUNS => None,
            OFF => Some(VmEnd::Off),
            _ => Some(VmEnd::Reset),
        }
    }

    /// Ends the VM for its guest, unless it has ended. From now on no vCPU is entered but for those that [`Vm::on`] returns, which
    /// have to be left. Returns how the VM has ended.
    pub(crate) fn end_as(&self, end: VmEnd) -> VmEnd {
        let state = if end == VmEnd::Off { OFF } else { RESET };
        // What other vCPUs have written and read has nothing to do with it.
        let _ = self.end.compare_exchange(RUNS, state, Relaxed, Relaxed);
        // Pairs with that of `end_before_entry`.
        fence(SeqCst);
        self.end().unwrap_or(end)
    }

    /// Returns how the guest has ended the VM, if it has, to a CPU that is about to enter a vCPU that is on. If it is ending just
    /// now, either that is seen here, or the vCPU is seen there, in [`Vm::on`].
    pub(crate) fn end_before_entry(&self) -> Option<VmEnd> {
        // Whoever has turned the vCPU on has done so before this, and whoever ends the VM looks for such vCPUs after that.
        fence(SeqCst);
        self.end()
    }

    /// Returns the vCPUs that are on.
    pub(crate) fn on(&self) -> VcpuSet {
        let mut on = VcpuSet::EMPTY;
        for (vcpu, slot) in self.vcpus.iter().enumerate() {
            if slot.power.is_on() {
                on.insert(vcpu);
            }
        }
        on
    }

    /// Returns how far the virtual counters of the VM are behind the physical one.
    pub(crate) fn counter_offset(&self) -> u64 {
        self.counter_offset.load(Relaxed)
    }

    /// Changes that, from the next run of each vCPU on.
    pub(crate) fn set_counter_offset(&self, offset: u64) {
        self.counter_offset.store(offset, Relaxed);
    }

    /// Runs `f` on the VM's interrupt controller. No other lock may be taken meanwhile.
    pub fn with_gic<R>(&self, f: impl FnOnce(&mut Gic<'_, VcpuGics<O>>) -> R) -> R {
        let mut gic = self.gic.lock();
        // Only who holds the lock writes.
        self.gic_changes.store(self.gic_changes.load(Relaxed).wrapping_add(1), Relaxed);
        f(&mut gic.view())
    }

    /// Prepares the entry of a vCPU, which concerns no other. If it may be repeated, as `f` says by [`Gic::enter_again`], returns until
    /// when: as long as [`Vm::gic_changes`] is this. Otherwise 0.
    pub(crate) fn enter_gic(&self, f: impl FnOnce(&mut Gic<'_, VcpuGics<O>>) -> bool) -> u64 {
        let mut gic = self.gic.lock();
        if f(&mut gic.view()) { self.gic_changes.load(Relaxed) } else { 0 }
    }

    /// Returns a number, not 0, that is another one after each [`Vm::with_gic`].
    ///
    /// Who sees the old one goes on as if it had come first. A vCPU that is entered so runs for the interrupt controller, and whoever
    /// changes anything for it is told to interrupt it.
    #[inline]
    pub(crate) fn gic_changes(&self) -> u64 {
        // Who sees another one takes the lock, which orders the rest. What the host is told before it runs the vCPU, on whichever CPU,
        // its own barriers order.
        self.gic_changes.load(Relaxed)
    }

    /// Returns the frame of the interrupt controller that a guest address lies in, and the offset there.
    pub(crate) fn gic_frame(&self, address: u64) -> Option<(Frame, u64)> {
        self.gic_frames?.find(address)
    }

    /// Returns the refusal of what a VM in this stage does not do.
    fn demand(&self, stage: Stage) -> Result<(), Refusal> {
        if self.stage == stage { Ok(()) } else { Err(Status::WrongState.into()) }
    }

    /// Returns the refusal of what a VM does not do that is dying.
    fn demand_alive(&self) -> Result<(), Refusal> {
        if self.stage == Stage::Dying { Err(Status::WrongState.into()) } else { Ok(()) }
    }

    /// Returns the range of the guest's memory that is at an address.
    fn range(&self, base: u64, pages: u64) -> Result<IpaRange, Refusal> {
        self.guest.range(base, pages).ok_or(Status::Overflow.into())
    }
}

/// All VMs.
///
/// What needs much of the stack is not inlined, so that no call needs the stack of all of them.
pub struct Vms<O: ObjectMemory, G: Send + Sync, V: Send + Sync> {
    objects: O,
    table: Table<O::Box<Vm<O, G, V>>>,
}

impl<O: ObjectMemory, G: Send + Sync, V: Send + Sync> Vms<O, G, V> {
    /// Returns a table without VMs, which keeps its objects in `objects`.
    #[cfg(not(loom))]
    pub const fn new(objects: O) -> Self {
        Self { objects, table: Table::new() }
    }

    /// Returns a table without VMs.
    #[cfg(loom)]
    pub fn new(objects: O) -> Self {
        Self { objects, table: Table::new() }
    }

    /// Returns how many pages a VM of these attributes takes, how many each of its vCPUs, whose state has `area` pages besides,
    /// and to how many pages those of the VM must be aligned.
    pub fn sizes<T: Transitions<Guest = G>>(attributes: VmAttributes, area: u64) -> (u64, u64, u64) {
        let sizes = Sizes::new::<T, O, V>(attributes);
        (sizes.total(), pages_for::<Vcpu<V>>(1).saturating_add(area), sizes.root)
    }

    /// Runs `f` on what the guest's calls work on, for those who compare it with what should be.
    ///
    /// # Errors
    ///
    /// BAD_HANDLE; BUSY.
    pub fn with_guest<R>(&self, handle: Handle, f: impl FnOnce(&Guest<G>) -> R) -> Result<R, Refusal> {
        self.table.shared(handle, |vm| Ok(f(&vm.guest)))
    }

    /// Makes a VM of pages that the host donates.
    ///
    /// # Errors
    ///
    /// INVALID unless there are as many pages as [`Vms::sizes`] says; UNALIGNED; those of [`Transitions::keep`]; LIMIT if
    /// there are 255 VMs.
    #[inline(never)]
    pub fn create<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        attributes: VmAttributes,
        metadata: PhysRange,
    ) -> Result<Handle, Refusal> {
        let sizes = Sizes::new::<T, O, V>(attributes);
        let parts = sizes.parts(metadata).ok_or(Status::Invalid)?;
        if !parts.root.base().is_aligned(parts.root.size()) {
            return Err(Status::Unaligned.into());
        }
        let vcpus = vcpus(attributes);
        self.table.create(|handle| {
            transitions.keep(metadata)?;
            let memory = transitions.new_guest(handle.slot(), attributes, parts.root);
            let memory = memory.inspect_err(|_| transitions.give_back(metadata))?;
            let objects = &self.objects;
            let gics = objects.place_slice(parts.gics, vcpus, |_| None);
            let spis = objects.place_slice(parts.spis, SPIS, |_| Spi::default());
            let vm = Vm {
                handle,
                stage: Stage::Created,
                guest: Guest::new(attributes, memory),
                measurement: Mutex::new(Some(Measurement::new())),
                vcpus: objects.place_slice(parts.vcpus, vcpus, |_| VcpuSlot::default()),
                gic: TicketMutex::new(VmGic::new(spis, gics)),
                gic_frames: None,
                end: AtomicU8::new(RUNS),
                gic_changes: AtomicU64::new(1),
                counter_offset: AtomicU64::new(0),
                metadata,
            };
            Ok(objects.place(parts.vm, vm))
        })
    }

    /// Gives a VM pages of the host for its tables.
    ///
    /// # Errors
    ///
    /// Those of [`Transitions::donate_tables`]. Also a dying VM may need some, where blocks have to be cut.
    #[inline(never)]
    pub fn donate_tables<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        tables: PhysRange,
    ) -> Result<(), Refusal> {
        self.table.shared(handle, |vm| transitions.donate_tables(&vm.guest.memory, tables))
    }

    /// Makes a vCPU. `state` returns its first state for the attributes of the VM, its index and the pages that its state has
    /// besides.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if the VM is sealed; INVALID if the VM cannot have a vCPU of this index, or unless there are as many pages
    /// as [`Vms::sizes`] says; EXISTS; those of [`Transitions::keep`] and [`Transitions::borrow_page`].
    #[inline(never)]
    pub fn create_vcpu<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        index: u64,
        pages: &VcpuPages,
        state: impl FnOnce(VmAttributes, usize, PhysRange) -> V,
    ) -> Result<(), Refusal> {
        let &VcpuPages { metadata, run_page, .. } = pages;
        self.table.shared(handle, |vm| {
            vm.demand(Stage::Created)?;
            let index = usize::try_from(index).map_err(|_| Status::Invalid)?;
            let slot = vm.vcpus.get(index).ok_or(Status::Invalid)?;
            let mut vcpu = slot.vcpu.try_lock().ok_or(Status::Busy)?;
            if vcpu.is_some() {
                return Err(Status::Exists.into());
            }
            let (object, area) = pages.cut::<V>().ok_or(Status::Invalid)?;
            transitions.borrow_page(run_page)?;
            transitions.keep(metadata).inspect_err(|_| transitions.return_page(run_page))?;
            let new = Vcpu { state: state(vm.guest.attributes, index, area), index, run_page, metadata };
            *vcpu = Some(self.objects.place(object, new));
            vm.gic.lock().add(index);
            slot.exists.store(true, Relaxed);
            Ok(())
        })
    }

    /// Puts pages of the host at a guest address. Those that a protected VM gets before it is sealed are measured.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if it is dying; OVERFLOW if the guest has no memory there; EXISTS if its interrupt controller is there;
    /// TOO_LARGE if too many pages had to be measured; BUSY while other pages are; those of [`Transitions::map`]. Nobody can take
    /// a page before it is measured, and EL2 keeps the tables for it in reserve: should it not be readable nevertheless, it is
    /// mapped, but the VM cannot be sealed any more.
    #[inline(never)]
    pub fn map<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        at: u64,
        range: PhysRange,
    ) -> Result<(), Refusal> {
        self.table.shared(handle, |vm| {
            vm.demand_alive()?;
            let frames = vm.range(at, range.pages())?;
            let taken = vm.gic_frames.into_iter().flat_map(|gic| gic.ranges());
            if let Some(gic) = taken.into_iter().find(|gic| gic.overlaps(&frames)) {
                return Err(Refusal { status: Status::Exists, detail: gic.base().raw().max(at) });
            }
            let measured = vm.stage == Stage::Created && vm.guest.kind().is_protected();
            if !measured {
                return transitions.map(&vm.guest.memory, range, frames.base());
            }
            if range.pages() > MAX_TAKE_BACK_PAGES {
                return Err(Status::TooLarge.into());
            }
            let mut guard = vm.measurement.try_lock().ok_or(Status::Busy)?;
            let mut measurement = guard.take().ok_or(Status::WrongState)?;
            let mapped = transitions.map_to_measure(&vm.guest.memory, range, frames.base());
            // A VM of which nobody knows what it is never runs.
            if mapped.is_ok() {
                measure(transitions, &vm.guest.memory, frames, &mut measurement)?;
            }
            *guard = Some(measurement);
            mapped
        })
    }

    /// Takes lent pages from an ordinary VM.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if it is dying or not an ordinary one; OVERFLOW; those of [`Transitions::unmap`].
    #[inline(never)]
    pub fn unmap<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        range: IpaRange,
    ) -> Result<(), Refusal> {
        self.on_frames(handle, range, |vm, range| {
            if vm.guest.kind().is_protected() {
                return Err(Status::WrongState.into());
            }
            transitions.unmap(&vm.guest.memory, range)
        })
    }

    /// Fixes what a VM is when it starts, and where.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if it is sealed already, or dying, or could not be measured; OVERFLOW if the guest has no memory there;
    /// INVALID if the frames of the interrupt controller are no multiples of their size, or overlap each other, EXISTS if they overlap
    /// pages of the guest; ABSENT without a vCPU 0; BUSY while anything else is done with the VM.
    #[inline(never)]
    pub fn seal<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        start: &Start,
    ) -> Result<(), Refusal> {
        self.alone(handle, |vm| {
            vm.demand(Stage::Created)?;
            let &Start { entry, device_tree, distributor, redistributors } = start;
            for address in [entry, device_tree] {
                vm.range(address & !(PAGE_SIZE.wrapping_sub(1)), 1)?;
            }
            let attributes = vm.guest.attributes;
            let frames = GicFrames::new(distributor, redistributors, attributes.vcpus).ok_or(Status::Invalid)?;
            for range in frames.ranges() {
                vm.range(range.base().raw(), range.pages())?;
                demand_absent(transitions, &vm.guest.memory, range)?;
            }
            let exist = vm.vcpus.iter().filter(|slot| slot.exists.load(Relaxed)).count();
            let measurement = vm.measurement.get_mut().as_ref().ok_or(Status::WrongState)?.clone();
            vm.power(0).ok_or(Status::Absent)?.boot(entry, device_tree);
            let seal = Seal { attributes, vcpus: u64::try_from(exist).unwrap_or(u64::MAX), start: *start };
            *vm.guest.measurements.get_mut() = Measurements::new(measurement.seal(&seal));
            vm.gic.get_mut().reset();
            vm.gic_frames = Some(frames);
            vm.stage = Stage::Sealed;
            Ok(())
        })
    }

    /// Runs `f` on a vCPU of a sealed VM, which nobody else can run meanwhile. The VM stays sealed.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if the VM is not sealed, or dying; ABSENT; BUSY if another CPU has it; those of `f`.
    pub fn run<R>(
        &self,
        handle: Handle,
        index: u64,
        f: impl FnOnce(&Vm<O, G, V>, &mut Vcpu<V>) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        self.with_vcpu(handle, index, |vm| vm.demand(Stage::Sealed), f)
    }

    /// Runs `f` on a vCPU of an ordinary VM, which nobody can run meanwhile.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if the VM is not an ordinary one, or dying; ABSENT; BUSY if another CPU has it; those of `f`.
    pub(crate) fn with_vcpu_of_ordinary<R>(
        &self,
        handle: Handle,
        index: u64,
        f: impl FnOnce(&Vm<O, G, V>, &mut Vcpu<V>) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let admits = |vm: &Vm<O, G, V>| {
            if vm.guest.kind().is_protected() { Err(Status::WrongState.into()) } else { vm.demand_alive() }
        };
        self.with_vcpu(handle, index, admits, f)
    }

    fn with_vcpu<R>(
        &self,
        handle: Handle,
        index: u64,
        admits: impl FnOnce(&Vm<O, G, V>) -> Result<(), Refusal>,
        f: impl FnOnce(&Vm<O, G, V>, &mut Vcpu<V>) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        self.table.shared(handle, |vm| {
            admits(vm)?;
            let slot = usize::try_from(index).ok().and_then(|index| vm.vcpus.get(index)).ok_or(Status::Absent)?;
            let mut vcpu = slot.vcpu.try_lock().ok_or(Status::Busy)?;
            f(vm, vcpu.as_mut().ok_or(Status::Absent)?)
        })
    }

    /// Moves the wire of an SPI, and returns the vCPUs that must look at their interrupts.
    ///
    /// # Errors
    ///
    /// WRONG_STATE unless the VM is sealed; INVALID for what is not an SPI of the host.
    #[inline(never)]
    pub fn raise_spi(&self, handle: Handle, intid: u64, level: bool) -> Result<VcpuSet, Refusal> {
        self.table.shared(handle, |vm| {
            vm.demand(Stage::Sealed)?;
            let intid = u32::try_from(intid).map_err(|_| Status::Invalid)?;
            let raised = vm.with_gic(|gic| gic.raise_spi(intid, level));
            Ok(raised.map_err(|_| Status::Invalid)?)
        })
    }

    /// Gives the host access to what the guest has offered.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if the VM is dying; OVERFLOW; those of [`Transitions::claim`].
    #[inline(never)]
    pub fn claim<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        range: IpaRange,
    ) -> Result<(), Refusal> {
        self.on_frames(handle, range, |vm, range| transitions.claim(&vm.guest.memory, range))
    }

    /// Ends the host's access to what it has claimed.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if the VM is dying; OVERFLOW; those of [`Transitions::release`].
    #[inline(never)]
    pub fn release<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        range: IpaRange,
    ) -> Result<(), Refusal> {
        self.on_frames(handle, range, |vm, range| transitions.release(&vm.guest.memory, range))
    }

    /// Takes pages that are private or offered from a living guest, all of the same one.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if its VM is dying; DENIED if the first page is not a guest's; BUSY if its VM is not sealed
    /// and another CPU maps pages or takes some; those of [`Transitions::force_reclaim`].
    #[inline(never)]
    pub fn force_reclaim<T: Transitions<Guest = G>>(&self, transitions: &T, range: PhysRange) -> Result<(), Refusal> {
        let denied = Refusal { status: Status::Denied, detail: range.base().raw() };
        let reclaimed = self.table.shared_slot(transitions.owner(range.base()).ok_or(denied)?, |vm| {
            vm.demand_alive()?;
            // VM_MAP on another CPU may have given pages away that it is about to read.
            let is_measured = vm.stage == Stage::Created;
            let _measuring = is_measured.then(|| vm.measurement.try_lock().ok_or(Status::Busy)).transpose()?;
            transitions.force_reclaim(&vm.guest.memory, range)
        });
        // The page was the guest's a moment ago.
        reclaimed.map_err(|refusal| if refusal.status == Status::BadHandle { denied } else { refusal })
    }

    /// Ends a VM's life.
    ///
    /// # Errors
    ///
    /// WRONG_STATE if it is dying already; BUSY while anything else is done with it.
    #[inline(never)]
    pub fn teardown<T: Transitions<Guest = G>>(&self, transitions: &T, handle: Handle) -> Result<(), Refusal> {
        self.alone(handle, |vm| {
            vm.demand_alive()?;
            transitions.kill(&vm.guest.memory);
            vm.stage = Stage::Dying;
            Ok(())
        })
    }

    /// Returns the pages of a dying VM in the first frames of a range to the host. Returns how many frames that was.
    ///
    /// # Errors
    ///
    /// WRONG_STATE unless it is dying; OVERFLOW; those of [`Transitions::reclaim`].
    #[inline(never)]
    pub fn reclaim<T: Transitions<Guest = G>>(
        &self,
        transitions: &T,
        handle: Handle,
        range: IpaRange,
    ) -> Result<u64, Refusal> {
        self.table.shared(handle, |vm| {
            vm.demand(Stage::Dying)?;
            let range = vm.range(range.base().raw(), range.pages())?;
            transitions.reclaim(&vm.guest.memory, range)
        })
    }

    /// Returns what was donated for a dying VM to the host, [`MAX_TAKE_BACK_PAGES`] at most, and then how many pages are left.
    /// With the last of them the handle loses its meaning.
    ///
    /// # Errors
    ///
    /// WRONG_STATE unless it is dying; BUSY while anything else is done with it; those of [`Transitions::return_tables`].
    #[inline(never)]
    pub fn destroy<T: Transitions<Guest = G>>(&self, transitions: &T, handle: Handle) -> Result<u64, Refusal> {
        self.table.alone(handle, |entry| {
            let vm = entry.as_mut().ok_or(Status::BadHandle)?;
            vm.demand(Stage::Dying)?;
            let metadata = vm.metadata;
            let room = MAX_TAKE_BACK_PAGES.saturating_sub(metadata.pages());
            let (mut most, mut left) = (room, 0_u64);
            for slot in vm.vcpus.iter_mut() {
                let Some(&Vcpu { metadata, .. }) = slot.vcpu.get_mut().as_deref() else { continue };
                match most.checked_sub(metadata.pages()) {
                    Some(rest) => most = rest,
                    None => left = left.saturating_add(metadata.pages()),
                }
            }
            // Before anything is returned, because it may fail.
            left = left.saturating_add(transitions.return_tables(&vm.guest.memory, most)?);
            most = room;
            for slot in vm.vcpus.iter_mut() {
                let vcpu = slot.vcpu.get_mut();
                let Some(&Vcpu { metadata, run_page, .. }) = vcpu.as_deref() else { continue };
                let Some(rest) = most.checked_sub(metadata.pages()) else { continue };
                most = rest;
                *vcpu = None;
                transitions.give_back(metadata);
                transitions.return_page(run_page);
            }
            if left != 0 {
                return Ok(left.saturating_add(metadata.pages()));
            }
            transitions.end_of_root(&vm.guest.memory);
            *entry = None;
            transitions.give_back(metadata);
            Ok(0)
        })
    }

    /// Does something with frames of a living VM.
    fn on_frames(
        &self,
        handle: Handle,
        range: IpaRange,
        f: impl FnOnce(&Vm<O, G, V>, IpaRange) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.table.shared(handle, |vm| {
            vm.demand_alive()?;
            f(vm, vm.range(range.base().raw(), range.pages())?)
        })
    }

    /// Takes a VM from one stage to the next.
    fn alone(&self, handle: Handle, f: impl FnOnce(&mut Vm<O, G, V>) -> Result<(), Refusal>) -> Result<(), Refusal> {
        self.table.alone(handle, |entry| f(entry.as_mut().ok_or(Status::BadHandle)?))
    }
}

/// Returns the refusal of frames that have, or had, pages.
fn demand_absent<T: Transitions>(transitions: &T, guest: &T::Guest, frames: IpaRange) -> Result<(), Refusal> {
    let mut left = Some(frames);
    while let Some(range) = left {
        let (page, known) = transitions.look(guest, range);
        if page != GuestPage::Absent {
            return Err(Refusal { status: Status::Exists, detail: range.base().raw() });
        }
        let done = known.max(1).saturating_mul(PAGE_SIZE);
        left = IpaRange::from_bounds(range.base().raw().saturating_add(done), range.end()).ok();
    }
    Ok(())
}

/// Adds private pages to a measurement.
fn measure<T: Transitions>(
    transitions: &T,
    guest: &T::Guest,
    frames: IpaRange,
    measurement: &mut Measurement,
) -> Result<(), Refusal> {
    let mut left = Some(frames);
    while let Some(range) = left {
        let mut pages = range.iter();
        let mut at = || pages.next().unwrap_or(range.base());
        let read = transitions.read_pages(guest, range, &mut |piece| measurement.add(&mut at, piece))?;
        let done = read.max(1).saturating_mul(PAGE_SIZE);
        left = IpaRange::from_bounds(range.base().raw().saturating_add(done), range.end()).ok();
    }
    Ok(())
}

/// Returns how many vCPUs a VM may have.
fn vcpus(attributes: VmAttributes) -> usize {
    usize::try_from(attributes.vcpus).unwrap_or(0)
}

/// Returns how many pages `count` values take.
fn pages_for<T>(count: usize) -> u64 {
    u64::try_from(size_of::<T>().saturating_mul(count)).unwrap_or(u64::MAX).div_ceil(PAGE_SIZE)
}

/// How many pages the parts of a VM take.
struct Sizes {
    root: u64,
    vm: u64,
    vcpus: u64,
    spis: u64,
    gics: u64,
}

/// Where the parts of a VM are.
struct Parts {
    root: PhysRange,
    vm: PhysRange,
    vcpus: PhysRange,
    spis: PhysRange,
    gics: PhysRange,
}

impl Sizes {
    fn new<T: Transitions, O: ObjectMemory, V: Send + Sync>(attributes: VmAttributes) -> Self {
        let vcpus = vcpus(attributes);
        Self {
            root: T::root_pages(attributes),
            vm: pages_for::<Vm<O, T::Guest, V>>(1),
            vcpus: pages_for::<VcpuSlot<O::Box<Vcpu<V>>>>(vcpus),
            spis: pages_for::<Spi>(SPIS),
            gics: pages_for::<Option<VcpuGic>>(vcpus),
        }
    }

    fn total(&self) -> u64 {
        [self.root, self.vm, self.vcpus, self.spis, self.gics].into_iter().fold(0, u64::saturating_add)
    }

    /// Cuts a range into the parts. `None` unless it has the right size.
    fn parts(&self, range: PhysRange) -> Option<Parts> {
        let mut next = range.base().raw();
        let mut cut = |pages| {
            let part = PhysRange::new(next, pages).ok().filter(|part| range.covers(part))?;
            next = part.end();
            Some(part)
        };
        let parts = Parts {
            root: cut(self.root)?,
            vm: cut(self.vm)?,
            vcpus: cut(self.vcpus)?,
            spis: cut(self.spis)?,
            gics: cut(self.gics)?,
        };
        (next == range.end()).then_some(parts)
    }
}

// Miri would take long over the measurements.
#[cfg(all(test, not(miri)))]
mod tests;
