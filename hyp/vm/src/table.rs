//! The table of VMs.

use ravelin_abi::Status;
use ravelin_sync::{
    RwLock,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use crate::{
    handle::{Handle, SLOTS},
    refusal::Refusal,
};

/// The slots that VMs live in.
///
/// Each slot has a lock: whoever uses the VM, such as a CPU that runs one of its vCPUs, holds it for reading; whoever makes
/// the VM, or takes it from one stage of its life to the next, holds it for writing, alone. Nobody waits for a lock: who does
/// not get it is [`Status::Busy`].
pub(crate) struct Table<T> {
    slots: [Slot<T>; SLOTS],
}

struct Slot<T> {
    /// Whether there is a VM: a hint that keeps those who look for a free slot away from the locks of VMs in use.
    taken: AtomicBool,
    content: RwLock<Content<T>>,
}

struct Content<T> {
    /// How many VMs have been here.
    generation: u64,
    vm: Option<T>,
}

impl<T> Table<T> {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self {
            slots: [const {
                Slot { taken: AtomicBool::new(false), content: RwLock::new(Content { generation: 0, vm: None }) }
            }; SLOTS],
        }
    }

    // Nothing of loom's is made at compile time.
    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        let slot = || Slot { taken: AtomicBool::new(false), content: RwLock::new(Content { generation: 0, vm: None }) };
        Self { slots: core::array::from_fn(|_| slot()) }
    }

    /// Puts what `make` returns into a free slot. `make` is told the handle, which is used for another VM if it fails.
    ///
    /// # Errors
    ///
    /// [`Status::Limit`] if no slot is free; [`Status::Busy`] if the only free ones are being looked at; those of `make`.
    pub(crate) fn create(&self, make: impl FnOnce(Handle) -> Result<T, Refusal>) -> Result<Handle, Refusal> {
        let mut refusal = Status::Limit;
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.taken.load(Relaxed) {
                continue;
            }
            let Some(mut content) = slot.content.try_write() else {
                refusal = Status::Busy;
                continue;
            };
            let next = content.generation.checked_add(1).filter(|_| content.vm.is_none());
            let Some((generation, handle)) = next.and_then(|next| Some((next, Handle::new(index, next)?))) else {
                continue;
            };
            content.vm = Some(make(handle)?);
            content.generation = generation;
            slot.taken.store(true, Relaxed);
            return Ok(handle);
        }
        Err(refusal.into())
    }

    /// Runs `f` on a VM, which others may be using as well. It stays, and in its stage of life, until `f` returns.
    ///
    /// # Errors
    ///
    /// [`Status::BadHandle`]; [`Status::Busy`] while somebody is [`Table::alone`] with it; those of `f`.
    pub(crate) fn shared<R>(&self, handle: Handle, f: impl FnOnce(&T) -> Result<R, Refusal>) -> Result<R, Refusal> {
        let slot = self.slot(handle)?;
        let content = slot.content.try_read().ok_or(Status::Busy)?;
        match &content.vm {
            Some(vm) if content.generation == handle.generation() => f(vm),
            _ => Err(Status::BadHandle.into()),
        }
    }

    /// Runs `f` on the VM in a slot, as [`Table::shared`] does.
    ///
    /// # Errors
    ///
    /// [`Status::BadHandle`] if there is none; [`Status::Busy`]; those of `f`.
    pub(crate) fn shared_slot<R>(&self, slot: usize, f: impl FnOnce(&T) -> Result<R, Refusal>) -> Result<R, Refusal> {
        let slot = self.slots.get(slot).ok_or(Status::BadHandle)?;
        let content = slot.content.try_read().ok_or(Status::Busy)?;
        content.vm.as_ref().map_or(Err(Status::BadHandle.into()), f)
    }

    /// Runs `f` on a VM that nobody else is using. If `f` takes it out, the handle has no meaning any more.
    ///
    /// # Errors
    ///
    /// [`Status::BadHandle`]; [`Status::Busy`] while anybody else is using it; those of `f`.
    pub(crate) fn alone<R>(
        &self,
        handle: Handle,
        f: impl FnOnce(&mut Option<T>) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        // A handle of the past is bad, whatever the VM that has the slot now is doing.
        self.shared(handle, |_| Ok(()))?;
        let slot = self.slot(handle)?;
        let mut content = slot.content.try_write().ok_or(Status::Busy)?;
        if content.vm.is_none() || content.generation != handle.generation() {
            return Err(Status::BadHandle.into());
        }
        let done = f(&mut content.vm);
        slot.taken.store(content.vm.is_some(), Relaxed);
        done
    }

    fn slot(&self, handle: Handle) -> Result<&Slot<T>, Status> {
        self.slots.get(handle.slot()).ok_or(Status::BadHandle)
    }
}

#[cfg(test)]
mod tests {
    #[cfg(loom)]
    mod models;

    use std::{
        sync::atomic::{AtomicU64, AtomicUsize},
        thread,
    };

    use super::*;

    const BAD: Refusal = Refusal { status: Status::BadHandle, detail: 0 };
    const BUSY: Refusal = Refusal { status: Status::Busy, detail: 0 };

    fn table() -> Box<Table<u64>> {
        Box::new(Table::new())
    }

    #[test]
    fn a_handle_is_good_for_one_vm() {
        let table = table();
        let first = table.create(|_| Ok(1)).unwrap();
        assert_eq!(table.shared(first, |vm| Ok(*vm)), Ok(1));
        assert_eq!(table.alone(first, |vm| Ok(vm.take())), Ok(Some(1)));
        let second = table.create(|_| Ok(2)).unwrap();
        assert_eq!(second.slot(), first.slot());
        assert_ne!(second, first);
        assert_eq!(table.shared(first, |_| Ok(())), Err(BAD));
        assert_eq!(table.alone(first, |_| Ok(())), Err(BAD));
        for raw in [0, 255, u64::MAX, second.raw() + 1, second.raw() + 256, second.raw() ^ 1 << 63] {
            assert_eq!(table.shared(Handle::from_raw(raw), |_| Ok(())), Err(BAD));
            assert_eq!(table.alone(Handle::from_raw(raw), |_| Ok(())), Err(BAD));
        }
        assert_eq!(table.shared(second, |vm| Ok(*vm)), Ok(2));
    }

    #[test]
    fn a_failed_creation_leaves_nothing() {
        let table = table();
        let refusal = Refusal { status: Status::Denied, detail: 7 };
        let mut seen = None;
        let failed = table.create(|handle| {
            seen = Some(handle);
            Err(refusal)
        });
        assert_eq!(failed, Err(refusal));
        assert_eq!(table.shared(seen.unwrap(), |_| Ok(())), Err(BAD));
        assert_eq!(table.create(|_| Ok(1)).ok(), seen);
    }

    #[test]
    fn there_are_255_vms() {
        let table = table();
        let handles: Vec<_> = (0..255).map(|vm| table.create(|_| Ok(vm)).unwrap()).collect();
        assert_eq!(table.create(|_| Ok(255)), Err(Status::Limit.into()));
        for (vm, &handle) in (0..).zip(&handles) {
            assert_eq!(table.shared(handle, |it| Ok(*it)), Ok(vm));
        }
        table.alone(handles[100], |vm| Ok(vm.take())).unwrap();
        assert_eq!(table.create(|_| Ok(0)).unwrap().slot(), 100);
    }

    #[test]
    fn a_slot_in_the_making_is_busy() {
        let table = table();
        for vm in 0..254 {
            table.create(|_| Ok(vm)).unwrap();
        }
        let last = table.create(|_| {
            assert_eq!(table.create(|_| Ok(255)), Err(BUSY));
            Ok(254)
        });
        assert_eq!(last.unwrap().slot(), 254);
    }

    #[test]
    fn a_slot_whose_handles_are_used_up_stays_empty() {
        let table = table();
        table.slots[0].content.try_write().unwrap().generation = (1 << 56) - 2;
        let last = table.create(|_| Ok(1)).unwrap();
        assert_eq!((last.slot(), last.generation()), (0, (1 << 56) - 1));
        table.alone(last, |vm| Ok(vm.take())).unwrap();
        let next = table.create(|_| Ok(2)).unwrap();
        assert_eq!((next.slot(), next.generation()), (1, 1));
        assert_eq!(table.shared(last, |_| Ok(())), Err(BAD));
    }

    #[test]
    fn users_and_owners_exclude_each_other() {
        let table = table();
        let handle = table.create(|_| Ok(1)).unwrap();
        table
            .shared(handle, |_| {
                assert_eq!(table.shared(handle, |_| Ok(())), Ok(()));
                assert_eq!(table.alone(handle, |_| Ok(())), Err(BUSY));
                Ok(())
            })
            .unwrap();
        table
            .alone(handle, |_| {
                assert_eq!(table.shared(handle, |_| Ok(())), Err(BUSY));
                assert_eq!(table.alone(handle, |_| Ok(())), Err(BUSY));
                // Creation goes elsewhere.
                assert_ne!(table.create(|_| Ok(2))?.slot(), handle.slot());
                Ok(())
            })
            .unwrap();
        // An old handle is bad even then.
        let old = Handle::new(handle.slot(), handle.generation() - 1).unwrap();
        table
            .shared(handle, |_| {
                assert_eq!(table.alone(old, |_| Ok(())), Err(BAD));
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn threads_create_use_and_destroy() {
        let rounds = if cfg!(miri) { 10 } else { 2000 };
        let table: Table<(Handle, AtomicUsize)> = Table::new();
        let newest = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        let handle = loop {
                            match table.create(|handle| Ok((handle, AtomicUsize::new(0)))) {
                                Ok(handle) => break handle,
                                Err(refusal) => assert_eq!(refusal, BUSY),
                            }
                        };
                        newest.store(handle.raw(), Relaxed);
                        let destroy = |vm: &mut Option<(Handle, AtomicUsize)>| {
                            let (its, users) = vm.take().unwrap();
                            assert_eq!((its, users.into_inner()), (handle, 0));
                            Ok(())
                        };
                        while table.alone(handle, destroy).map_err(|refusal| assert_eq!(refusal, BUSY)).is_err() {}
                    }
                    newest.store(u64::MAX, Relaxed);
                });
            }
            scope.spawn(|| {
                let mut used = 0_u64;
                while newest.load(Relaxed) != u64::MAX {
                    let handle = Handle::from_raw(newest.load(Relaxed));
                    let outcome = table.shared(handle, |(its, users)| {
                        assert_eq!(*its, handle);
                        users.fetch_add(1, Relaxed);
                        users.fetch_sub(1, Relaxed);
                        used += 1;
                        Ok(())
                    });
                    assert!(matches!(outcome, Ok(()) | Err(BAD | BUSY)));
                }
            });
        });
    }
}
