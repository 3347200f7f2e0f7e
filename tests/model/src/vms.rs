//! The life of VMs, and what the host does with their memory.

use core::ops::Range;

use alloc::vec::Vec;
use ravelin_abi::{GIC_FRAME_SIZE, Status, VmAttributes, VmKind};

use crate::{
    Model, PAGE_SIZE, Real, STEPS, differs,
    memory::{NO_STATE, pages},
    runs::Runs,
    state::{Backing, Frame, Page, Place, Stage, Vcpu, Vm},
    verdict::{Refusal, Verdict, demand},
};

/// How many VMs there can be at once.
pub const MOST_VMS: usize = 255;

/// Frames of a guest's interrupt controller, in pages.
const GIC_FRAME: u64 = GIC_FRAME_SIZE / PAGE_SIZE;

/// What calls about VMs may answer because something else is going on with them.
const BUSY: &[Status] = &[Status::Busy];

impl Stage {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Created => "Created",
            Self::Sealed => "Sealed",
            Self::Dying => "Dying",
        }
    }
}

impl Vm {
    /// Refuses what a VM in this stage does not do.
    fn demand(&self, stages: &[Stage]) -> Result<&'static str, Refusal> {
        let state = self.stage.name();
        if stages.contains(&self.stage) { Ok(state) } else { Err(Refusal::new(Status::WrongState, state)) }
    }

    /// Refuses frames that are not the guest's memory.
    fn demand_frames(&self, frames: &Range<u64>) -> Result<(), Refusal> {
        if frames.end <= self.frame_count() { Ok(()) } else { Err(Refusal::new(Status::Overflow, self.stage.name())) }
    }
}

/// A VM that has not been torn down.
const ALIVE: &[Stage] = &[Stage::Created, Stage::Sealed];

impl Model {
    /// Returns what a call about VMs has to do.
    pub(crate) fn vm_call(&mut self, call: &'static str, x: [u64; 6]) -> Verdict {
        let attributes = || VmAttributes::from_bits(x[0]).expect("checked");
        let frames = || pages(x[1], x[2]);
        match call {
            "VM_SIZES" => self.vm_sizes(attributes()),
            // What there is in which register is not the model's.
            "REGISTER_RESET_VALUE" => Verdict::returns(NO_STATE, |_, _, _| Ok(())).or(&[Status::Invalid]),
            "VM_CREATE" => self.vm_create(attributes(), pages(x[1], x[2])),
            "FORCE_RECLAIM" => self.force_reclaim(pages(x[0], x[1])),
            _ => {
                let [handle, ..] = x;
                let Some(vm) = self.state.vms.get(&handle).cloned() else {
                    return Refusal::new(Status::BadHandle, NO_STATE).into();
                };
                match call {
                    "VM_DONATE_TABLES" => self.donate_tables(handle, pages(x[1], x[2])),
                    "VCPU_CREATE" => self.create_vcpu(handle, &vm, x[1], pages(x[2], x[3]), x[4] / PAGE_SIZE),
                    "VM_MAP" => self.map(handle, &vm, x[1] / PAGE_SIZE, pages(x[2], x[3])),
                    "VM_UNMAP" => self.unmap(handle, &vm, frames()),
                    "VM_SEAL" => self.seal(handle, &vm, x),
                    "VCPU_GET_REGISTER" | "VCPU_SET_REGISTER" => register(&vm, x[1]),
                    "VCPU_RUN" => run(&vm, x[1]),
                    "SPI" => spi(&vm),
                    "VM_TEARDOWN" => teardown(handle, &vm),
                    "VM_RECLAIM" => self.reclaim(handle, &vm, frames()),
                    "VM_DESTROY" => self.destroy(handle, &vm),
                    "CLAIM" => self.claim(handle, &vm, frames()),
                    "RELEASE" => self.release(handle, &vm, frames()),
                    _ => unreachable!("{call} is not in the specification"),
                }
            }
        }
    }

    /// Remembers to look at frames, whatever becomes of them, and at the pages that are there.
    pub(crate) fn touch_frames(&mut self, handle: u64, frames: Range<u64>) {
        if let Some(vm) = self.state.vms.get(&handle) {
            for (part, backing) in vm.frames.parts(frames.clone()) {
                if let Some(Backing(first)) = backing {
                    self.touched.pages.push(first..first + (part.end - part.start));
                }
            }
        }
        self.touched.frames.push((handle, frames));
    }

    pub(crate) fn vm(&mut self, handle: u64) -> &mut Vm {
        self.state.vms.get_mut(&handle).expect("it has been looked up")
    }

    /// Demands something of each frame, in ascending order; returns the state of the first.
    ///
    /// A call does so many pages at least. Behind these it may say TOO_LARGE before it comes to what is wrong: `Err` has both then.
    fn demand_frames_each(
        &self,
        vm: &Vm,
        frames: &Range<u64>,
        demand: impl Fn(Frame) -> Result<(), Status>,
    ) -> Result<&'static str, Refusal> {
        let mut first = None;
        for (part, frame) in self.state.look(vm, frames.clone()) {
            demand(frame).map_err(|status| Refusal { status, detail: part.start * PAGE_SIZE, state: frame.name() })?;
            first = first.or(Some(frame.name()));
        }
        Ok(first.unwrap_or(NO_STATE))
    }

    /// Takes a step for frames of a VM, all or nothing: what `demand` accepts becomes what `change` says.
    fn change_frames(
        &mut self,
        handle: u64,
        vm: &Vm,
        frames: Range<u64>,
        demand: impl Fn(Frame) -> Result<(), Status>,
        effect: impl Fn(&mut Self, Range<u64>, Range<u64>) + 'static,
    ) -> Verdict {
        demand!(vm.demand(ALIVE));
        demand!(vm.demand_frames(&frames));
        self.touch_frames(handle, frames.clone());
        let long = frames.end - frames.start > STEPS;
        match self.demand_frames_each(vm, &frames, demand) {
            Ok(state) => Verdict::does(state, move |model| {
                for (frames, backing) in model.parts_with_pages(handle, frames) {
                    effect(model, frames, backing);
                }
            })
            .or(if long {
                &[Status::Busy, Status::TooLarge, Status::NeedsTables]
            } else {
                &[Status::Busy, Status::NeedsTables]
            }),
            Err(refusal) => {
                let behind = refusal.detail / PAGE_SIZE - frames.start >= STEPS;
                Verdict::from(refusal).or(if behind { &[Status::Busy, Status::TooLarge] } else { BUSY })
            }
        }
    }

    /// Returns the frames that have pages, and their pages.
    pub(crate) fn parts_with_pages(&self, handle: u64, frames: Range<u64>) -> Vec<(Range<u64>, Range<u64>)> {
        let Some(vm) = self.state.vms.get(&handle) else { return Vec::new() };
        let with_page = |(part, backing): (Range<u64>, Option<Backing>)| {
            let Backing(first) = backing?;
            let length = part.end - part.start;
            Some((part, first..first + length))
        };
        vm.frames.parts(frames).filter_map(with_page).collect()
    }

    /// The host asks how many pages it has to donate.
    fn vm_sizes(&self, attributes: VmAttributes) -> Verdict {
        let sizes = (self.sizes)(attributes);
        Verdict::returns(NO_STATE, move |_, results, _| {
            if results == [sizes.vm, sizes.vcpu, sizes.alignment] { Ok(()) } else { differs!("and not {sizes:?}") }
        })
    }

    /// The host makes a VM of pages that it gives away.
    fn vm_create(&mut self, attributes: VmAttributes, metadata: Range<u64>) -> Verdict {
        self.touch(metadata.clone());
        let sizes = (self.sizes)(attributes);
        if metadata.end - metadata.start != sizes.vm {
            return Refusal::new(Status::Invalid, NO_STATE).into();
        }
        if !metadata.start.is_multiple_of(sizes.alignment) {
            return Refusal::new(Status::Unaligned, NO_STATE).into();
        }
        if self.state.vms.len() == MOST_VMS {
            return Verdict::from(Refusal::new(Status::Limit, "Full")).or(BUSY);
        }
        let state = match self.demand_owned(metadata.clone()) {
            Ok(state) => state,
            Err(refusal) => return Verdict::from(refusal).or(BUSY),
        };
        Verdict::returns(state, move |model, [handle, ..], _| {
            if !model.state.handles.insert(handle) {
                return differs!("a handle that has been used before");
            }
            model.set(metadata.clone(), Page::Kept);
            model.state.vms.insert(
                handle,
                Vm {
                    attributes: attributes.bits(),
                    stage: Stage::Created,
                    frames: Runs::default(),
                    poisoned: Runs::default(),
                    devices: Runs::default(),
                    gic: None,
                    vcpus: Default::default(),
                    metadata: (metadata.start, metadata.end),
                    tables: Runs::default(),
                },
            );
            Ok(())
        })
        .or(&[Status::Busy, Status::NoMemory])
    }

    /// The host gives a VM pages for its translation tables, at any time of its life.
    fn donate_tables(&mut self, handle: u64, tables: Range<u64>) -> Verdict {
        self.touch(tables.clone());
        match self.demand_owned(tables.clone()) {
            // No table is at address 0.
            Ok(state) if tables.start == 0 => {
                Verdict::from(Refusal { status: Status::Denied, detail: 0, state }).or(BUSY)
            }
            Ok(state) => Verdict::does(state, move |model| {
                model.set(tables.clone(), Page::Kept);
                model.vm(handle).tables.set(tables, ());
            })
            .or(&[Status::Busy, Status::NoMemory]),
            Err(refusal) => Verdict::from(refusal).or(BUSY),
        }
    }

    /// The host makes a vCPU of pages that it gives away, and lends its run page.
    fn create_vcpu(&mut self, handle: u64, vm: &Vm, index: u64, metadata: Range<u64>, run_page: u64) -> Verdict {
        self.touch(metadata.clone());
        self.touch(run_page..run_page + 1);
        let lends = || {
            vm.demand(&[Stage::Created])?;
            let state = vm.stage.name();
            let attributes = vm.decoded();
            if index >= attributes.vcpus {
                return Err(Refusal::new(Status::Invalid, state));
            }
            if vm.vcpus.contains_key(&index) {
                return Err(Refusal::new(Status::Exists, state));
            }
            // Nothing can be made at address 0.
            if metadata.end - metadata.start != (self.sizes)(attributes).vcpu || metadata.start == 0 {
                return Err(Refusal::new(Status::Invalid, state));
            }
            self.demand_owned(run_page..run_page + 1)
        };
        let gives = || {
            if metadata.contains(&run_page) {
                // It cannot be both. What comes before it has to be in order, though.
                self.demand_owned(metadata.start..run_page)?;
                return Err(Refusal { status: Status::Denied, detail: run_page * PAGE_SIZE, state: Page::Run.name() });
            }
            self.demand_owned(metadata.clone())
        };
        if let Err(refusal) = lends() {
            return Verdict::from(refusal).or(BUSY);
        }
        // The run page has been mapped before anything is wrong with the others, which may take tables.
        match gives() {
            Ok(state) => Verdict::does(state, move |model| {
                model.set(run_page..run_page + 1, Page::Run);
                model.set(metadata.clone(), Page::Kept);
                model.vm(handle).vcpus.insert(index, Vcpu { metadata: (metadata.start, metadata.end), run_page });
            })
            .or(&[Status::Busy, Status::NoMemory]),
            Err(refusal) => Verdict::from(refusal).or(&[Status::Busy, Status::NoMemory]),
        }
    }

    /// The host puts pages into a VM: a protected one becomes their owner, to an ordinary one they are lent.
    fn map(&mut self, handle: u64, vm: &Vm, at: u64, range: Range<u64>) -> Verdict {
        self.touch(range.clone());
        let count = range.end - range.start;
        let frames = at..at + count;
        let is_protected = vm.kind().is_protected();
        demand!(vm.demand(ALIVE));
        demand!(vm.demand_frames(&frames));
        self.touch_frames(handle, frames.clone());
        if let Some(&(start, _)) =
            vm.gic.iter().flatten().find(|(start, end)| *start < frames.end && frames.start < *end)
        {
            let detail = start.max(at) * PAGE_SIZE;
            return Verdict::from(Refusal { status: Status::Exists, detail, state: "Gic" }).or(BUSY);
        }
        let is_measured = is_protected && vm.stage == Stage::Created;
        if is_measured && count > STEPS {
            return Verdict::from(Refusal::new(Status::TooLarge, vm.stage.name())).or(BUSY);
        }
        let state = match self.demand_owned(range.clone()) {
            Ok(state) => state,
            Err(refusal) => {
                let behind = refusal.detail / PAGE_SIZE - range.start >= STEPS;
                return Verdict::from(refusal).or(if behind { &[Status::Busy, Status::TooLarge] } else { BUSY });
            }
        };
        // Frames that are taken are told by the pages that were meant for them.
        let taken = self.demand_frames_each(vm, &frames, |frame| match frame {
            Frame::Absent => Ok(()),
            Frame::Poisoned => Err(Status::Poisoned),
            Frame::Page(..) => Err(Status::Exists),
        });
        let long: &[Status] = if count > STEPS { &[Status::Busy, Status::TooLarge] } else { BUSY };
        if let Err(Refusal { status, detail, state }) = taken {
            let detail = (detail / PAGE_SIZE - at + range.start) * PAGE_SIZE;
            return Verdict::from(Refusal { status, detail, state }).or(long);
        }
        let verdict = Verdict::does(state, move |model| {
            let place = Place { vm: handle, frame: at };
            model.set(range.clone(), if is_protected { Page::Private(place) } else { Page::Lent(place) });
            model.vm(handle).frames.set(frames, Backing(range.start));
        });
        if count > STEPS {
            verdict.or(&[Status::Busy, Status::NeedsTables, Status::NoMemory, Status::TooLarge])
        } else {
            verdict.or(&[Status::Busy, Status::NeedsTables, Status::NoMemory])
        }
    }

    /// The host takes lent pages from an ordinary VM.
    fn unmap(&mut self, handle: u64, vm: &Vm, frames: Range<u64>) -> Verdict {
        demand!(vm.demand(ALIVE));
        demand!(vm.demand_frames(&frames));
        if vm.kind().is_protected() {
            return Refusal::new(Status::WrongState, vm.stage.name()).into();
        }
        let lent = |frame| match frame {
            Frame::Page(_, Page::Lent(_)) => Ok(()),
            Frame::Absent => Err(Status::Absent),
            _ => Err(Status::Denied),
        };
        self.change_frames(handle, vm, frames, lent, move |model, frames, pages| {
            model.vm(handle).frames.clear(frames);
            model.set(pages, Page::Host);
        })
    }

    /// The host takes up an offer.
    fn claim(&mut self, handle: u64, vm: &Vm, frames: Range<u64>) -> Verdict {
        let offered = |frame| match frame {
            Frame::Page(_, Page::Offered(_)) => Ok(()),
            Frame::Page(_, Page::Private(_)) => Err(Status::NotOffered),
            Frame::Page(..) => Err(Status::Denied),
            Frame::Poisoned => Err(Status::Poisoned),
            Frame::Absent => Err(Status::Absent),
        };
        self.change_frames(handle, vm, frames, offered, move |model, frames, pages| {
            model.set(pages, Page::Claimed(Place { vm: handle, frame: frames.start }));
        })
    }

    /// The host ends its use of what it has claimed; it stays offered.
    fn release(&mut self, handle: u64, vm: &Vm, frames: Range<u64>) -> Verdict {
        let claimed = |frame| match frame {
            Frame::Page(_, Page::Claimed(_)) => Ok(()),
            Frame::Page(..) => Err(Status::Denied),
            Frame::Poisoned => Err(Status::Poisoned),
            Frame::Absent => Err(Status::Absent),
        };
        self.change_frames(handle, vm, frames, claimed, move |model, frames, pages| {
            model.set(pages, Page::Offered(Place { vm: handle, frame: frames.start }));
        })
    }

    /// The host ends the making of a VM.
    fn seal(&self, handle: u64, vm: &Vm, [_, entry, device_tree, distributor, redistributors, _]: [u64; 6]) -> Verdict {
        let checked = || {
            let state = vm.demand(&[Stage::Created])?;
            for address in [entry, device_tree] {
                vm.demand_frames(&pages(address, 1))?;
            }
            let end_of = |base: u64, frames: u64| base / PAGE_SIZE + frames * GIC_FRAME;
            let distributor = distributor / PAGE_SIZE..end_of(distributor, 1);
            let redistributors = redistributors / PAGE_SIZE..end_of(redistributors, 2 * vm.decoded().vcpus);
            let overlap = distributor.start < redistributors.end && redistributors.start < distributor.end;
            let is_beyond = |range: &Range<u64>| range.end > ravelin_abi::ADDRESS_END / PAGE_SIZE;
            if overlap || is_beyond(&distributor) || is_beyond(&redistributors) {
                return Err(Refusal::new(Status::Invalid, state));
            }
            for frames in [&distributor, &redistributors] {
                vm.demand_frames(frames)?;
                self.demand_frames_each(vm, frames, |frame| match frame {
                    Frame::Absent => Ok(()),
                    _ => Err(Status::Exists),
                })?;
            }
            if !vm.vcpus.contains_key(&0) {
                return Err(Refusal::new(Status::Absent, state));
            }
            Ok((state, [distributor, redistributors].map(|frames| (frames.start, frames.end))))
        };
        match checked() {
            Ok((state, gic)) => Verdict::does(state, move |model| {
                let vm = model.vm(handle);
                vm.stage = Stage::Sealed;
                vm.gic = Some(gic);
            })
            .or(BUSY),
            Err(refusal) => Verdict::from(refusal).or(BUSY),
        }
    }

    /// The host takes pages that it has no access to from a guest that is alive. Their frames are poisoned.
    fn force_reclaim(&mut self, range: Range<u64>) -> Verdict {
        self.touch(range.clone());
        let denied = Refusal { status: Status::Denied, detail: range.start * PAGE_SIZE, state: NO_STATE };
        let first = self.state.pages.get(range.start);
        let Some(Place { vm: handle, .. }) = first.and_then(Page::guest) else {
            return Refusal { state: first.map_or("NotRam", Page::name), ..denied }.into();
        };
        let Some(vm) = self.state.vms.get(&handle) else { return denied.into() };
        if let Err(refusal) = vm.demand(ALIVE) {
            return Verdict::from(refusal).or(BUSY);
        }
        let its = |page| match page {
            Page::Private(place) | Page::Offered(place) if place.vm == handle => Ok(()),
            _ => Err(Status::Denied),
        };
        let state = match self.demand_each(range.clone(), its) {
            Ok(state) => state,
            Err(refusal) => return Verdict::from(refusal).or(BUSY),
        };
        Verdict::does(state, move |model| {
            let parts: Vec<_> = model.state.pages.parts(range.clone()).collect();
            for (part, page) in parts {
                if let Some(Place { frame, .. }) = page.and_then(Page::guest) {
                    let frames = frame..frame + (part.end - part.start);
                    model.touched.frames.push((handle, frames.clone()));
                    model.vm(handle).frames.clear(frames.clone());
                    model.vm(handle).poisoned.set(frames, ());
                }
            }
            model.scrub(range);
        })
        .or(&[Status::Busy, Status::NeedsTables, Status::NoMemory])
    }

    /// The host takes back pages of a VM that was torn down: private ones zeroed, others with what the guest has put there. A call
    /// does as many frames as it likes, but at least one.
    fn reclaim(&mut self, handle: u64, vm: &Vm, frames: Range<u64>) -> Verdict {
        let state = demand!(vm.demand(&[Stage::Dying]));
        demand!(vm.demand_frames(&frames));
        self.touch_frames(handle, frames.clone());
        Verdict::returns(state, move |model, [done, ..], _| {
            if done == 0 || done > frames.end - frames.start {
                return differs!("{done} frames of {} are done", frames.end - frames.start);
            }
            for (frames, pages) in model.parts_with_pages(handle, frames.start..frames.start + done) {
                model.vm(handle).frames.clear(frames);
                let parts: Vec<_> = model.state.pages.parts(pages).collect();
                for (pages, page) in parts {
                    match page {
                        Some(Page::Private(_) | Page::Pinned(_)) => model.scrub(pages),
                        _ => model.set(pages, Page::Host),
                    }
                }
            }
            Ok(())
        })
        .or(&[Status::Busy, Status::NeedsTables, Status::NoMemory])
    }

    /// The host takes back what a VM without memory was made of, zeroed: vCPUs first, in as many calls as it takes, and the VM itself
    /// last. Which tables come back with which call is open.
    fn destroy(&self, handle: u64, vm: &Vm) -> Verdict {
        let state = match vm.demand(&[Stage::Dying]) {
            Ok(_) if !vm.frames.is_empty() => return Refusal::new(Status::Busy, "DyingWithMemory").into(),
            Ok(state) => state,
            Err(refusal) => return Verdict::from(refusal).or(BUSY),
        };
        let vm = vm.clone();
        Verdict::returns(state, move |model, [left, ..], real| model.take_apart(handle, vm, left, real))
            .or(&[Status::Busy, Status::NoMemory])
    }

    fn take_apart(&mut self, handle: u64, mut vm: Vm, left: u64, real: &dyn Real) -> Result<(), crate::Difference> {
        let is_back = |page: u64| {
            let mut back = false;
            real.pages(page..page + 1, &mut |_, page| back = page == Page::Host);
            back
        };
        // What is back as a whole, vCPU by vCPU and page by page.
        let mut back = Vec::new();
        vm.vcpus.retain(|_, vcpu| {
            let (start, end) = vcpu.metadata;
            let stays = !is_back(start);
            if !stays {
                back.push((start..end, Some(vcpu.run_page)));
            }
            stays
        });
        let tables: Vec<_> = vm.tables.iter().flat_map(|(run, ())| run).collect();
        for page in tables.into_iter().filter(|&page| is_back(page)) {
            vm.tables.clear(page..page + 1);
            back.push((page..page + 1, None));
        }
        let (start, end) = vm.metadata;
        if left == 0 {
            back.push((start..end, None));
        }
        for (pages, run_page) in back {
            self.scrub(pages);
            if let Some(run_page) = run_page {
                self.set(run_page..run_page + 1, Page::Host);
            }
        }
        let vcpus: u64 = vm.vcpus.values().map(|vcpu| vcpu.metadata.1 - vcpu.metadata.0).sum();
        let remains = vcpus + vm.tables.count() + if left == 0 { 0 } else { end - start };
        if remains != left {
            return differs!("{remains} pages are left");
        }
        if left == 0 {
            self.state.vms.remove(&handle);
        } else {
            vm.poisoned = Runs::default();
            self.state.vms.insert(handle, vm);
        }
        Ok(())
    }
}

/// The host ends a VM. None of its vCPUs may run.
fn teardown(handle: u64, vm: &Vm) -> Verdict {
    match vm.demand(ALIVE) {
        Ok(state) => Verdict::does(state, move |model| model.vm(handle).stage = Stage::Dying).or(BUSY),
        Err(refusal) => Verdict::from(refusal).or(BUSY),
    }
}

/// The host looks at or changes a register. Whether there is such a register, and with which value, is not the model's.
fn register(vm: &Vm, index: u64) -> Verdict {
    let state = if vm.kind() == VmKind::Ordinary { vm.demand(ALIVE) } else { vm.demand(&[]) };
    match state {
        Ok(state) if vm.vcpus.contains_key(&index) => {
            Verdict::returns(state, |_, _, _| Ok(())).or(&[Status::Busy, Status::Invalid])
        }
        Ok(state) => Verdict::from(Refusal::new(Status::Absent, state)).or(BUSY),
        Err(refusal) => Verdict::from(refusal).or(BUSY),
    }
}

/// The host runs a vCPU. What the guest does meanwhile is judged by itself. A vCPU that is off, or has ended, is WRONG_STATE; an
/// answer in the run page that does not belong is INVALID.
fn run(vm: &Vm, index: u64) -> Verdict {
    match vm.demand(&[Stage::Sealed]) {
        Ok(state) if vm.vcpus.contains_key(&index) => {
            Verdict::does(state, |_| ()).or(&[Status::Busy, Status::WrongState, Status::Invalid, Status::NotSupported])
        }
        Ok(state) => Verdict::from(Refusal::new(Status::Absent, state)).or(BUSY),
        Err(refusal) => Verdict::from(refusal).or(BUSY),
    }
}

/// The host moves the wire of an interrupt. Which there are is not the model's.
fn spi(vm: &Vm) -> Verdict {
    match vm.demand(&[Stage::Sealed]) {
        Ok(state) => Verdict::returns(state, |_, _, _| Ok(())).or(&[Status::Busy, Status::Invalid]),
        Err(refusal) => Verdict::from(refusal).or(BUSY),
    }
}
