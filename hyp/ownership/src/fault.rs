//! The host's stage 2 as a cache: filled when the host faults.

use ravelin_memory::{Ipa, Level, PAGE_SIZE, PhysRange};
use ravelin_pgtable::{Machine, MapError, Stage2Usage, TablePool};

use crate::memory::{Inner, Memory};

/// How much is looked at around a page that is missing in a last-level table, in bytes, a power of two: the rest was mapped
/// when the table was made, if it has been the host's since then.
const NEIGHBOURHOOD: u64 = 64 * PAGE_SIZE;

/// What to do after a translation fault of the host at stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFault {
    /// The access may be tried again.
    Resolved,
    /// The host may not access the page: it gets an abort.
    Denied,
}

impl<P: TablePool> Memory<'_, P> {
    /// Maps the page at `ipa` for the host, with as much around it as one block holds, if the host may access it.
    ///
    /// For translation faults: one that another CPU has dealt with already is resolved. A permission fault, which only
    /// execution of device memory takes, is not for this.
    pub fn host_fault<M: Machine>(&self, machine: &M, ipa: Ipa) -> HostFault {
        let mut inner = self.lock(machine);
        let fault = inner.host_fault(machine, ipa);
        let count = match fault {
            HostFault::Resolved => &mut inner.counts.faults_resolved,
            HostFault::Denied => &mut inner.counts.faults_denied,
        };
        *count = count.wrapping_add(1);
        fault
    }
}

impl<P: TablePool> Inner<'_, P> {
    fn host_fault<M: Machine>(&mut self, machine: &M, ipa: Ipa) -> HostFault {
        let walk = self.host.lookup(machine, ipa);
        if walk.mapping.is_some() {
            return HostFault::Resolved;
        }
        let page = ipa.page().identity_pa();
        let (true, Some(usage)) = (ipa.raw() < self.host.geometry().end(), self.table.host_access(page)) else {
            return HostFault::Denied;
        };
        let mut mapped = self.fill(machine, ipa, walk.level, usage);
        if mapped == Err(MapError::OutOfTables) {
            self.evict_host(machine);
            // Nothing is left below the root.
            mapped = self.fill(machine, ipa, self.host.geometry().start(), usage);
        }
        match mapped {
            Ok(()) => HostFault::Resolved,
            Err(_) => HostFault::Denied,
        }
    }

    /// Maps the largest block around `ipa` that is all of one usage and not larger than an entry of level `ended`, where
    /// the walk came upon an invalid one; without such a block, every page of its last-level table, or of the neighbourhood if
    /// there is such a table.
    fn fill<M: Machine>(&mut self, machine: &M, ipa: Ipa, ended: Level, usage: Stage2Usage) -> Result<(), MapError> {
        let around =
            |size: u64| PhysRange::new(ipa.align_down(size).raw(), size / PAGE_SIZE).map_err(|_| MapError::OutOfRange);
        for level in [Level::L1, Level::L2] {
            let range = around(level.size())?;
            if level >= ended
                && range.end() <= self.host.geometry().end()
                && self.table.is_uniform_for_host(range, usage)
            {
                return self.host.map(machine, &mut self.pool, range.identity_ipa(), range.base(), usage);
            }
        }
        let range = around(if ended == Level::L3 { NEIGHBOURHOOD } else { Level::L2.size() })?;
        let mut result = Ok(());
        let Self { table, host, pool, .. } = self;
        table.host_runs(range, &mut |run, usage| {
            result = result.and_then(|()| host.map(machine, pool, run.identity_ipa(), run.base(), usage));
        });
        result
    }
}
