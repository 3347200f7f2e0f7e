//! What guests do with their memory: pKVM's hypercalls, and the Realm Services Interface.
//!
//! A guest's call either ends, with results in its registers, or becomes an exit: then nothing has happened yet, the registers
//! are as they were, and the host does something before the guest calls again, or has the guest told that it refuses.

use core::ops::Range;

use alloc::vec::Vec;
use ravelin_abi::{MAX_RANGE_PAGES, VmKind};

use crate::{
    Difference, Model, PAGE_SIZE, Reached, STEPS, Touched, differs,
    memory::NO_STATE,
    state::{Frame, Page, Place, Vm},
};

/// The instruction by which a guest calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// HVC, as pKVM's guests do.
    Hvc,
    /// SMC, as realms do.
    Smc,
}

/// A call of a guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestCall {
    /// Number of the page where the root of the VM's stage 2 is, the first of those that the VM is made of.
    pub root: u64,
    /// The instruction, which has no immediate.
    pub door: Door,
    /// x0 to x3 before.
    pub before: [u64; 4],
    /// x0 to x3 afterwards; the same if the call has become an exit.
    pub after: [u64; 4],
}

// pKVM's calls.
const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;
const MMIO_GUARD: u64 = 0xc600_0007;
const MEM_RELINQUISH: u64 = 0xc600_0009;
const MEM_RING: u64 = 0xc600_0038;

// Calls of RSI.
const IPA_STATE_SET: u64 = 0xc400_0197;
const IPA_STATE_GET: u64 = 0xc400_0198;

// States of RSI.
const EMPTY: u64 = 0;
const RAM: u64 = 1;
const DESTROYED: u64 = 2;

/// INVALID_PARAMETER of SMCCC.
const INVALID: u64 = (-3_i64).cast_unsigned();

/// ERROR_INPUT of RSI.
const ERROR_INPUT: u64 = 1;

/// How many ranges a guest may name as devices at least.
const DEVICES: u64 = 32;

/// What a call may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum May {
    /// The first pages are done: so many at least, and so many at most.
    Do(u64, u64),
    /// It fails, and nothing has changed.
    Fail,
    /// It becomes an exit, and nothing has changed.
    Exit,
}

/// What a call has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Became {
    Done(u64),
    Failed,
    Exit,
}

impl Became {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Done(_) => "DONE",
            Self::Failed => "FAILED",
            Self::Exit => "EXIT",
        }
    }

    pub(crate) fn is_one_of(self, allowed: &[May]) -> bool {
        allowed.iter().any(|&may| match (may, self) {
            (May::Do(least, most), Self::Done(done)) => (least..=most).contains(&done),
            (May::Fail, Self::Failed) | (May::Exit, Self::Exit) => true,
            _ => false,
        })
    }
}

/// A change that a guest makes to its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Share,
    Unshare,
    /// Also of what the host has claimed, because it consents.
    UnshareReleased,
    /// For a ring, and back.
    Pin,
    Unpin,
    Relinquish,
    /// Nothing: the frames are as the guest wants them.
    Nothing,
}

impl Model {
    /// Judges a call of a guest that has just been handled.
    ///
    /// # Errors
    ///
    /// What is wrong. The model is of no use then.
    pub fn guest_call(&mut self, call: &GuestCall) -> Result<Reached, Difference> {
        self.touched = Touched::default();
        let (handle, vm) = self.by_root(call.root)?;
        let [x0, ..] = call.before;
        let function = x0 & 0xffff_ffff;
        match (call.door, vm.kind(), function) {
            (Door::Hvc, VmKind::Pkvm, MEM_SHARE) => self.pkvm(handle, &vm, call, "MEM_SHARE", Change::Share),
            (Door::Hvc, VmKind::Pkvm, MEM_UNSHARE) => self.pkvm(handle, &vm, call, "MEM_UNSHARE", Change::Unshare),
            (Door::Hvc, VmKind::Pkvm, MEM_RELINQUISH) => {
                self.pkvm(handle, &vm, call, "MEM_RELINQUISH", Change::Relinquish)
            }
            (Door::Hvc, VmKind::Pkvm, MMIO_GUARD) => self.guard(handle, &vm, call),
            (Door::Hvc, VmKind::Pkvm, MEM_RING) => self.ring_call(handle, &vm, call),
            (Door::Smc, VmKind::Realm, IPA_STATE_SET) => self.set_state(handle, &vm, call),
            (Door::Smc, VmKind::Realm, IPA_STATE_GET) => self.get_state(handle, &vm, call),
            // What else guests call has nothing to do with who has which page.
            _ => Ok(Reached { state: NO_STATE, call: "GUEST_CALL", result: "ANY" }),
        }
    }

    /// Returns handle and state of the VM whose root of stage 2 is at this page.
    pub(crate) fn by_root(&self, root: u64) -> Result<(u64, Vm), Difference> {
        let found = self.state.vms.iter().find(|(_, vm)| vm.metadata.0 == root);
        let Some((&handle, vm)) = found else {
            return differs!("a guest runs whose tables are at page {root:#x}, where no VM is");
        };
        Ok((handle, vm.clone()))
    }

    /// MEM_RING: address, 1 to make the page the vCPU's ring or 0 to end that, 0. Which vCPU has which ring is not known.
    fn ring_call(&mut self, handle: u64, vm: &Vm, call: &GuestCall) -> Result<Reached, Difference> {
        let [_, base, attach, reserved] = call.before;
        let frames = memory_range(vm, base, 1).filter(|_| reserved == 0 && attach <= 1);
        let frame = frames.clone().and_then(|frames| self.state.look(vm, frames).next());
        let state = frame.as_ref().map_or(NO_STATE, |(_, frame)| frame.name());
        let became = match call.after {
            after if after == call.before => Became::Exit,
            [0, 0, 0, 0] => Became::Done(1),
            [INVALID, 0, 0, 0] => Became::Failed,
            after => return differs!("MEM_RING {:x?} left {after:x?}", call.before),
        };
        let (allowed, change): (&[May], _) = match (attach, frame) {
            // It has one, or tables are missing.
            (1, Some((_, Frame::Page(_, Page::Private(_))))) => (&[May::Do(1, 1), May::Fail], Change::Pin),
            (1, Some((_, Frame::Absent))) => (&[May::Exit, May::Fail], Change::Nothing),
            // It is another vCPU's.
            (0, Some((_, Frame::Page(_, Page::Pinned(_))))) => (&[May::Do(1, 1), May::Fail], Change::Unpin),
            _ => (&[May::Fail], Change::Nothing),
        };
        let reached = Reached { state, call: "MEM_RING", result: became.name() };
        self.conclude(handle, frames, call, reached, became, allowed, change)
    }

    /// MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH: address, number of pages (0 for one), 0.
    fn pkvm(
        &mut self,
        handle: u64,
        vm: &Vm,
        call: &GuestCall,
        name: &'static str,
        change: Change,
    ) -> Result<Reached, Difference> {
        let [_, base, count, reserved] = call.before;
        let pages = count.max(1);
        let frames = memory_range(vm, base, pages).filter(|frames| {
            let named = vm.devices.parts(frames.clone()).any(|(_, device)| device.is_some());
            reserved == 0 && pages <= MAX_RANGE_PAGES && !named
        });
        let became = match call.after {
            after if after == call.before => Became::Exit,
            [0, done, 0, 0] if count != 0 => Became::Done(done),
            [0, 0, 0, 0] => Became::Done(1),
            [INVALID, 0, 0, 0] => Became::Failed,
            after => return differs!("{name} {:x?} left {after:x?}", call.before),
        };
        let (allowed, state) = match &frames {
            None => (alloc::vec![May::Fail], NO_STATE),
            Some(frames) => self.allowed(vm, frames, change),
        };
        self.conclude(
            handle,
            frames,
            call,
            Reached { state, call: name, result: became.name() },
            became,
            &allowed,
            change,
        )
    }

    /// Returns what a change of frames may come to, and the state of the frame that decides.
    pub(crate) fn allowed(&self, vm: &Vm, frames: &Range<u64>, change: Change) -> (Vec<May>, &'static str) {
        let length = frames.end - frames.start;
        let (mut first, mut claimed, mut wrong) = (None, None, None);
        for (part, frame) in self.state.look(vm, frames.clone()) {
            first = first.or(Some(frame.name()));
            let at = part.start - frames.start;
            let refused = match (change, frame) {
                (Change::Share, Frame::Page(_, Page::Private(_)))
                | (Change::Unshare | Change::UnshareReleased, Frame::Page(_, Page::Offered(_)))
                | (Change::UnshareReleased, Frame::Page(_, Page::Claimed(_)))
                | (Change::Relinquish, Frame::Poisoned | Frame::Page(_, Page::Private(_))) => continue,
                (Change::Unshare, Frame::Page(_, Page::Claimed(_))) => {
                    claimed = claimed.or(Some((at, frame.name())));
                    continue;
                }
                // The host may put a page there.
                (Change::Share | Change::Unshare | Change::UnshareReleased, Frame::Absent) => May::Exit,
                _ => May::Fail,
            };
            wrong = Some((at, refused, frame.name()));
            break;
        }
        // A call does so many pages at least. Scrubbing also ends when there are too many separate runs of pages.
        let least = if change == Change::Relinquish { 1 } else { length.min(STEPS) };
        let is_short = length <= STEPS;
        if let Some((at, refused, state)) = wrong
            && (is_short || at < least)
        {
            return (alloc::vec![refused], state);
        }
        let mut allowed: Vec<_> = wrong.map(|(_, refused, _)| refused).into_iter().collect();
        let mut state = first.unwrap_or(NO_STATE);
        let most = wrong.map_or(length, |(at, ..)| at);
        match claimed {
            Some((at, name)) => {
                state = name;
                allowed.push(May::Exit);
                if at >= least {
                    allowed.push(May::Do(least, at));
                }
            }
            None => allowed.push(May::Do(least, most)),
        }
        // Tables may be missing to cut a block.
        if change == Change::Relinquish {
            allowed.push(May::Exit);
        }
        (allowed, state)
    }

    /// Compares what a call has come to with what it may, and goes on.
    #[expect(clippy::too_many_arguments, reason = "all that is known of the call")]
    fn conclude(
        &mut self,
        handle: u64,
        frames: Option<Range<u64>>,
        call: &GuestCall,
        reached: Reached,
        became: Became,
        allowed: &[May],
        change: Change,
    ) -> Result<Reached, Difference> {
        if let Some(frames) = &frames {
            self.touch_frames(handle, frames.clone());
        }
        if !became.is_one_of(allowed) {
            let Reached { call: name, state, .. } = reached;
            return differs!(
                "{name} {:x?} left {:x?}, which is {became:?} and not one of {allowed:?} ({state})",
                call.before,
                call.after
            );
        }
        if let (Became::Done(done), Some(frames)) = (became, frames) {
            self.change(handle, frames.start..frames.start + done, change);
        }
        Ok(reached)
    }

    /// Changes frames, all of which can be.
    pub(crate) fn change(&mut self, handle: u64, frames: Range<u64>, change: Change) {
        for (part, pages) in self.parts_with_pages(handle, frames.clone()) {
            let place = Place { vm: handle, frame: part.start };
            match change {
                Change::Share => self.set(pages, Page::Offered(place)),
                Change::Unshare | Change::UnshareReleased | Change::Unpin => self.set(pages, Page::Private(place)),
                Change::Pin => self.set(pages, Page::Pinned(place)),
                Change::Relinquish => {
                    self.vm(handle).frames.clear(part);
                    self.scrub(pages);
                }
                Change::Nothing => {}
            }
        }
        if change == Change::Relinquish {
            self.vm(handle).poisoned.clear(frames);
        }
    }

    /// MMIO_GUARD: says that a device is at an address.
    fn guard(&mut self, handle: u64, vm: &Vm, call: &GuestCall) -> Result<Reached, Difference> {
        let [_, base, zeroes @ ..] = call.before;
        let frames = memory_range(vm, base, 1).filter(|_| zeroes == [0; 2]);
        let frame = frames.clone().and_then(|frames| self.state.look(vm, frames).next());
        let state = frame.as_ref().map_or(NO_STATE, |(_, frame)| frame.name());
        let full = vm.devices.count() >= DEVICES;
        let became = match call.after {
            [0, 0, 0, 0] => Became::Done(1),
            [INVALID, 0, 0, 0] => Became::Failed,
            after => return differs!("MMIO_GUARD {:x?} left {after:x?}", call.before),
        };
        let allowed: &[May] = match frame {
            Some((_, Frame::Absent)) if full => &[May::Do(1, 1), May::Fail],
            Some((_, Frame::Absent)) => &[May::Do(1, 1)],
            _ => &[May::Fail],
        };
        if let (Became::Done(_), Some(frames)) = (became, &frames) {
            self.vm(handle).devices.set(frames.clone(), ());
        }
        let reached = Reached { state, call: "MMIO_GUARD", result: became.name() };
        self.conclude(handle, frames, call, reached, became, allowed, Change::Nothing)
    }

    /// IPA_STATE_SET: base, top, state. Does the first frames, as many as it likes, of those that are in one state.
    fn set_state(&mut self, handle: u64, vm: &Vm, call: &GuestCall) -> Result<Reached, Difference> {
        let [_, base, top, wanted] = call.before;
        let frames = bounds(vm, base, top).filter(|_| [EMPTY, RAM].contains(&wanted));
        let name = if wanted == EMPTY { "IPA_STATE_SET_EMPTY" } else { "IPA_STATE_SET_RAM" };
        let became = match call.after {
            after if after == call.before => Became::Exit,
            [0, next, 0, same] if same == wanted && next > base && next <= top && next % PAGE_SIZE == 0 => {
                Became::Done((next - base) / PAGE_SIZE)
            }
            [0, next, 1, same] if same == wanted && next == base => Became::Failed,
            [ERROR_INPUT, x1, x2, x3] if [x1, x2, x3] == [base, top, wanted] => Became::Failed,
            after => return differs!("{name} {:x?} left {after:x?}", call.before),
        };
        let is_error = call.after[0] == ERROR_INPUT;
        let Some(frames) = frames else {
            if !is_error {
                return differs!("{name} {:x?} left {:x?} and not an error", call.before, call.after);
            }
            return Ok(Reached { state: NO_STATE, call: name, result: "ERROR" });
        };
        if is_error {
            return differs!("{name} {:x?} is an error", call.before);
        }
        let (mut allowed, state, change) = self.allowed_in_realm(vm, &frames, wanted);
        // Tables may be missing to move what is shared, or was.
        if change != Change::Nothing {
            allowed.push(May::Exit);
        }
        let reached = Reached { state, call: name, result: became.name() };
        self.conclude(handle, Some(frames), call, reached, became, &allowed, change)
    }

    /// Returns what IPA_STATE_SET may come to, the state of the first frame, and what happens to the frames that are done.
    fn allowed_in_realm(&self, vm: &Vm, frames: &Range<u64>, wanted: u64) -> (Vec<May>, &'static str, Change) {
        // Frames in the state of the first one, and what comes behind them.
        let kind = |frame: Frame| frame.name();
        let mut parts = self.state.look(vm, frames.clone()).peekable();
        let first = parts.peek().map_or(Frame::Absent, |(_, frame)| *frame);
        let (mut same, mut behind) = (0, None);
        for (part, frame) in parts {
            if kind(frame) != kind(first) {
                behind = Some(frame);
                break;
            }
            same = part.end - frames.start;
        }
        let least = same.min(STEPS);
        let (allowed, change) = match (wanted, first) {
            (_, Frame::Poisoned) => (alloc::vec![May::Fail], Change::Nothing),
            (EMPTY, Frame::Absent) => (alloc::vec![May::Exit], Change::Nothing),
            (EMPTY, Frame::Page(_, Page::Private(_))) => {
                let allowed = match behind {
                    None => alloc::vec![May::Do(least, same)],
                    // The host is asked for the page before anything is shared, unless that is far off.
                    Some(Frame::Absent) if same < STEPS => alloc::vec![May::Exit],
                    Some(_) => alloc::vec![May::Do(1, same)],
                };
                (allowed, Change::Share)
            }
            (RAM, Frame::Page(_, Page::Claimed(_))) => (alloc::vec![May::Exit], Change::Nothing),
            (RAM, Frame::Page(_, Page::Offered(_))) => (alloc::vec![May::Do(1, same)], Change::Unshare),
            // It is so already.
            _ => (alloc::vec![May::Do(1, same)], Change::Nothing),
        };
        (allowed, first.name(), change)
    }

    /// IPA_STATE_GET: base, top. Says how far the state of the first frame goes at least.
    fn get_state(&mut self, handle: u64, vm: &Vm, call: &GuestCall) -> Result<Reached, Difference> {
        const NAME: &str = "IPA_STATE_GET";
        let [_, base, top, x3] = call.before;
        let Some(frames) = bounds(vm, base, top) else {
            if call.after != [ERROR_INPUT, base, top, x3] {
                return differs!("{NAME} {:x?} left {:x?} and not an error", call.before, call.after);
            }
            return Ok(Reached { state: NO_STATE, call: NAME, result: "ERROR" });
        };
        let [status, end, state, same] = call.after;
        if status != 0 || same != x3 || end <= base || end > top || end % PAGE_SIZE != 0 {
            return differs!("{NAME} {:x?} left {:x?}", call.before, call.after);
        }
        let found = frames.start..end / PAGE_SIZE;
        self.touch_frames(handle, found.clone());
        let first = self.state.look(vm, found.clone()).next().map_or(NO_STATE, |(_, frame)| frame.name());
        for (part, frame) in self.state.look(vm, found) {
            let is_right = match frame {
                // By what the realm has said before.
                Frame::Absent => [EMPTY, RAM].contains(&state),
                Frame::Poisoned => state == DESTROYED,
                Frame::Page(_, Page::Offered(_) | Page::Claimed(_)) => state == EMPTY,
                Frame::Page(..) => state == RAM,
            };
            if !is_right {
                return differs!("{NAME} {:x?} left {:x?}, and {part:x?} is {frame:?}", call.before, call.after);
            }
        }
        let result = match state {
            EMPTY => "EMPTY",
            RAM => "RAM",
            _ => "DESTROYED",
        };
        Ok(Reached { state: first, call: NAME, result })
    }
}

/// Returns the frames of a range that a guest names, if it is in its memory.
fn memory_range(vm: &Vm, base: u64, pages: u64) -> Option<Range<u64>> {
    let first = base / PAGE_SIZE;
    let end = first.checked_add(pages)?;
    (base.is_multiple_of(PAGE_SIZE) && pages != 0 && end <= vm.frame_count()).then_some(first..end)
}

/// Returns the frames from `base` to `top`, if they are in the realm's memory.
fn bounds(vm: &Vm, base: u64, top: u64) -> Option<Range<u64>> {
    let size = top.checked_sub(base).filter(|size| size.is_multiple_of(PAGE_SIZE))?;
    memory_range(vm, base, size / PAGE_SIZE)
}
