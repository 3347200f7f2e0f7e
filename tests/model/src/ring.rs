//! What the hypervisor does for the ring of a guest's vCPU, without a call of the guest: conversions, one after the other.

use core::ops::Range;

use alloc::vec::Vec;

use crate::{
    Difference, Model, Reached, Touched, differs,
    guest::{Became, Change, May},
    state::{Frame, Page},
};

/// The most pages of one.
const MOST_PAGES: u64 = 512;

/// A conversion that was asked for.
#[derive(Clone, Debug)]
pub struct RingConversion {
    /// Numbers of the frames.
    pub frames: Range<u64>,
    /// Whether they are to be offered to the host, or else private again.
    pub share: bool,
    /// Whether the host has consented to lose what it has claimed.
    pub released: bool,
    /// Whether it has been done.
    pub done: bool,
}

impl Model {
    /// Judges a batch of conversions of the VM whose root of stage 2 is at this page, by number. Returns what they have reached.
    ///
    /// # Errors
    ///
    /// What is wrong. The model is of no use then.
    pub fn ring(
        &mut self,
        root: u64,
        conversions: impl Iterator<Item = RingConversion>,
    ) -> Result<Vec<Reached>, Difference> {
        self.touched = Touched::default();
        let (handle, vm) = self.by_root(root)?;
        let mut reached = Vec::new();
        for conversion in conversions {
            let RingConversion { frames, share, released, done } = conversion.clone();
            let (change, call) = match (share, released) {
                (true, _) => (Change::Share, "RING_SHARE"),
                (false, false) => (Change::Unshare, "RING_UNSHARE"),
                (false, true) => (Change::UnshareReleased, "RING_UNSHARE_RELEASED"),
            };
            let (allowed, state) = self.allowed(&vm, &frames, change);
            let pages = frames.end - frames.start;
            let became = if done { Became::Done(pages) } else { Became::Failed };
            // What makes the guest's call an exit refuses this, or lets it wait.
            let is_allowed = became.is_one_of(&allowed) || !done && allowed.contains(&May::Exit);
            if !is_allowed || pages > MOST_PAGES || frames.end > vm.frame_count() {
                return differs!("{conversion:x?} of a ring, and allowed is {allowed:?} ({state})");
            }
            self.touch_frames(handle, frames.clone());
            if done {
                self.change(handle, frames, change);
            }
            reached.push(Reached { state, call, result: became.name() });
        }
        Ok(reached)
    }

    /// Judges that the ring in this frame of the VM whose root of stage 2 is at this page is no ring any more, because its vCPU has
    /// started anew.
    ///
    /// # Errors
    ///
    /// As [`Model::ring`].
    pub fn ring_lost(&mut self, root: u64, frame: u64) -> Result<Reached, Difference> {
        self.touched = Touched::default();
        let (handle, vm) = self.by_root(root)?;
        let found = self.state.look(&vm, frame..frame + 1).next();
        let Some((_, Frame::Page(_, page @ Page::Pinned(_)))) = found else {
            return differs!("a ring in frame {frame:#x} is lost, which is {found:?}");
        };
        self.touch_frames(handle, frame..frame + 1);
        self.change(handle, frame..frame + 1, Change::Unpin);
        Ok(Reached { state: page.name(), call: "RING_LOST", result: Became::Done(1).name() })
    }
}
