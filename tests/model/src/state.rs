//! The state: who has which page, and what VMs there are.

use alloc::collections::{BTreeMap, BTreeSet};
use core::ops::Range;

use ravelin_abi::{VmAttributes, VmKind};

use crate::runs::{Follow, Runs};

/// A page of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Page {
    /// The host's alone.
    Host,
    /// The host's, lent to the hypervisor, which has it mapped while it is pinned.
    Shared {
        /// How often it is pinned.
        pins: u64,
    },
    /// The host's, in use as the run page of a vCPU.
    Run,
    /// The host's, lent to an ordinary VM.
    Lent(Place),
    /// The hypervisor's from the start.
    Hypervisor,
    /// The hypervisor's, donated by the host.
    Donated,
    /// The hypervisor's, for what a VM is made of.
    Kept,
    /// A guest's alone.
    Private(Place),
    /// A guest's, which the hypervisor has mapped, too: the ring of a vCPU.
    Pinned(Place),
    /// A guest's, offered to the host, which has not taken it up.
    Offered(Place),
    /// A guest's, and the host has access.
    Claimed(Place),
}

/// Where in which VM a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The VM's handle.
    pub vm: u64,
    /// Guest address divided by the page size.
    pub frame: u64,
}

impl Page {
    /// The most pins of a page.
    pub const MOST_PINS: u64 = 4095;

    /// Returns whether the host may access the page.
    #[must_use]
    pub const fn host_may(self) -> bool {
        matches!(self, Self::Host | Self::Shared { .. } | Self::Run | Self::Lent(_) | Self::Claimed(_))
    }

    /// Returns whether the hypervisor has the page mapped, of those that it has not had from the start.
    #[must_use]
    pub const fn hypervisor_has(self) -> bool {
        matches!(self, Self::Shared { pins: 1.. } | Self::Run | Self::Donated | Self::Kept | Self::Pinned(_))
    }

    /// Returns where the guest has the page mapped that may access it, if one may.
    #[must_use]
    pub const fn guest(self) -> Option<Place> {
        match self {
            Self::Lent(place)
            | Self::Private(place)
            | Self::Pinned(place)
            | Self::Offered(place)
            | Self::Claimed(place) => Some(place),
            _ => None,
        }
    }

    /// Returns whether more than one of host, hypervisor and guests may access the page because its owner has said so.
    #[must_use]
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Shared { .. } | Self::Run | Self::Lent(_) | Self::Pinned(_) | Self::Claimed(_))
    }

    /// Returns the name of the state, as coverage has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "Host",
            Self::Shared { pins: 0 } => "Shared",
            Self::Shared { pins: Self::MOST_PINS } => "SharedFull",
            Self::Shared { .. } => "SharedPinned",
            Self::Run => "Run",
            Self::Lent(_) => "Lent",
            Self::Hypervisor => "Hypervisor",
            Self::Donated => "Donated",
            Self::Kept => "Kept",
            Self::Private(_) => "Private",
            Self::Pinned(_) => "Pinned",
            Self::Offered(_) => "Offered",
            Self::Claimed(_) => "Claimed",
        }
    }
}

impl Follow for Page {
    fn after(self, pages: u64) -> Self {
        let behind = |Place { vm, frame }| Place { vm, frame: frame + pages };
        match self {
            Self::Lent(place) => Self::Lent(behind(place)),
            Self::Private(place) => Self::Private(behind(place)),
            Self::Pinned(place) => Self::Pinned(behind(place)),
            Self::Offered(place) => Self::Offered(behind(place)),
            Self::Claimed(place) => Self::Claimed(behind(place)),
            _ => self,
        }
    }
}

/// Number of a page of RAM that is in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backing(pub u64);

impl Follow for Backing {
    fn after(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

/// What a frame is to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Frame {
    /// There is no page.
    Absent,
    /// The page was taken by force.
    Poisoned,
    /// There is this page, in this state.
    Page(Backing, Page),
}

impl Frame {
    /// Returns the name of the state, as coverage has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "Absent",
            Self::Poisoned => "Poisoned",
            Self::Page(_, page) => page.name(),
        }
    }
}

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// It is being made.
    Created,
    /// It can run.
    Sealed,
    /// It has ended; what it has goes back to the host.
    Dying,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vcpu {
    /// Pages that it is made of.
    pub metadata: Span,
    /// Page by which its host runs it.
    pub run_page: u64,
}

/// A range that can be compared: first page, and page behind the last.
pub type Span = (u64, u64);

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vm {
    /// Its kind, bits of its addresses and most vCPUs, as a register has them.
    pub attributes: u64,
    /// Where in its life it is.
    pub stage: Stage,
    /// Which page is in which frame.
    pub frames: Runs<Backing>,
    /// Frames whose pages were taken by force.
    pub poisoned: Runs<()>,
    /// Frames that a pKVM guest has named as devices.
    pub devices: Runs<()>,
    /// Frames of the interrupt controller, since it is sealed.
    pub gic: Option<[Span; 2]>,
    /// Its vCPUs, by index.
    pub vcpus: BTreeMap<u64, Vcpu>,
    /// Pages that it is made of.
    pub metadata: Span,
    /// Pages for its translation tables.
    pub tables: Runs<()>,
}

impl Vm {
    /// Returns what [`Vm::attributes`] stands for.
    #[must_use]
    pub fn decoded(&self) -> VmAttributes {
        VmAttributes::from_bits(self.attributes).expect("attributes were checked when the VM was made")
    }

    /// Returns its kind.
    #[must_use]
    pub fn kind(&self) -> VmKind {
        self.decoded().kind
    }

    /// Returns how many frames it has: of a realm's addresses, the lower half.
    #[must_use]
    pub fn frame_count(&self) -> u64 {
        let VmAttributes { kind, ipa_bits, .. } = self.decoded();
        1 << (ipa_bits - 12 - u64::from(kind == VmKind::Realm))
    }

    /// Returns whether it has not been torn down.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.stage != Stage::Dying
    }
}

/// All of memory and all VMs: plain maps and sets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct State {
    /// RAM.
    pub pages: Runs<Page>,
    /// VMs, by handle.
    pub vms: BTreeMap<u64, Vm>,
    /// All handles that ever were.
    pub handles: BTreeSet<u64>,
}

impl State {
    /// Returns what the frames in `frames` are to their guest, in parts of one kind, in ascending order.
    pub fn look(&self, vm: &Vm, frames: Range<u64>) -> impl Iterator<Item = (Range<u64>, Frame)> {
        vm.frames.parts(frames).flat_map(move |(part, backing)| {
            let absent = backing.is_none().then(|| {
                vm.poisoned.parts(part.clone()).map(|(part, poison)| match poison {
                    Some(()) => (part, Frame::Poisoned),
                    None => (part, Frame::Absent),
                })
            });
            let present = backing.map(|backing| {
                let Backing(first) = backing;
                self.pages.parts(first..first + (part.end - part.start)).map(move |(pages, page)| {
                    let behind = pages.start - first;
                    let part = part.start + behind..part.start + behind + (pages.end - pages.start);
                    (part, Frame::Page(backing.after(behind), page.expect("only RAM is in frames")))
                })
            });
            absent.into_iter().flatten().chain(present.into_iter().flatten())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The core claim: two may touch a page only if its owner shares it.
    #[test]
    fn only_what_is_shared_has_two_users() {
        let place = Place { vm: 1, frame: 2 };
        let pages = [
            Page::Host,
            Page::Shared { pins: 0 },
            Page::Shared { pins: 1 },
            Page::Run,
            Page::Lent(place),
            Page::Hypervisor,
            Page::Donated,
            Page::Kept,
            Page::Private(place),
            Page::Pinned(place),
            Page::Offered(place),
            Page::Claimed(place),
        ];
        for page in pages {
            let hypervisor = page.hypervisor_has() || page == Page::Hypervisor;
            let users = u8::from(page.host_may()) + u8::from(hypervisor) + u8::from(page.guest().is_some());
            assert!(users == 1 || page.is_shared(), "{page:?} has {users} users");
            assert!((1..=2).contains(&users), "{page:?} has {users} users");
        }
    }
}
