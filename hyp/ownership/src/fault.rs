//! The host's stage 2 as a cache: filled when the host faults.

use ravelin_memory::{Ipa, Level, PAGE_SIZE, PhysRange};
use ravelin_pgtable::{Machine, MapError, Stage2Usage, TablePool};

use crate::{
    locked::{Locked, Mask},
    memory::Memory,
    pool::Tables,
    region::Region,
};

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
        let index = self.index_of(ipa.identity_pa());
        self.with(machine, Mask::NONE.with(index), |locked| locked.host_fault(machine, index, ipa))
    }
}

impl<P: TablePool, M: Machine> Locked<'_, '_, P, M> {
    fn host_fault(&mut self, machine: &M, index: usize, ipa: Ipa) -> HostFault {
        let needed = match self.at(index) {
            Some((region, tables)) => match region.host_fault(machine, tables, ipa) {
                Ok(fault) => return region.count(fault),
                Err(needed) => needed,
            },
            None => return HostFault::Denied,
        };
        // Nothing is left below the root then.
        let enough = self.reserve_or_evict(machine, needed, 0);
        match self.at(index) {
            Some((region, tables)) if enough => {
                let fault = region.host_fault(machine, tables, ipa).unwrap_or(HostFault::Denied);
                region.count(fault)
            }
            _ => HostFault::Denied,
        }
    }
}

impl Region<'_> {
    /// As [`Memory::host_fault`]. If there are too few tables, returns how many it takes.
    fn host_fault<P: TablePool, M: Machine>(
        &mut self,
        machine: &M,
        tables: &mut Tables<'_, P>,
        ipa: Ipa,
    ) -> Result<HostFault, usize> {
        let walk = self.host.lookup(machine, ipa);
        if walk.output().is_some() {
            return Ok(HostFault::Resolved);
        }
        let page = ipa.page().identity_pa();
        let (true, Some(usage)) = (ipa.raw() < self.host.geometry().end(), self.table.host_access(page)) else {
            return Ok(HostFault::Denied);
        };
        self.fill(machine, tables, ipa, walk.level, usage).map(|done| match done {
            Ok(()) => HostFault::Resolved,
            Err(_) => HostFault::Denied,
        })
    }

    const fn count(&mut self, fault: HostFault) -> HostFault {
        let count = match fault {
            HostFault::Resolved => &mut self.counts.faults_resolved,
            HostFault::Denied => &mut self.counts.faults_denied,
        };
        *count = count.wrapping_add(1);
        fault
    }

    /// Maps the largest block around `ipa` that is all of one usage and not larger than an entry of level `ended`, where
    /// the walk came upon an invalid one; without such a block, every page of its last-level table, or of the neighbourhood if
    /// there is such a table. If there are too few tables, returns how many it takes.
    fn fill<P: TablePool, M: Machine>(
        &mut self,
        machine: &M,
        tables: &mut Tables<'_, P>,
        ipa: Ipa,
        ended: Level,
        usage: Stage2Usage,
    ) -> Result<Result<(), MapError>, usize> {
        let around = |size: u64| PhysRange::new(ipa.align_down(size).raw(), size / PAGE_SIZE);
        let mut have = |level: Level| {
            // One for each level in between.
            let needed = usize::try_from(level.number().saturating_sub(ended.number())).unwrap_or_default();
            if tables.reserve(needed, 0) { Ok(()) } else { Err(needed) }
        };
        for level in [Level::L1, Level::L2] {
            let Ok(range) = around(level.size()) else { continue };
            if level >= ended
                && range.end() <= self.host.geometry().end()
                && self.table.is_uniform_for_host(range, usage)
            {
                have(level)?;
                return Ok(self.host.map(machine, tables, range.identity_ipa(), range.base(), usage));
            }
        }
        have(Level::L3)?;
        let Ok(range) = around(if ended == Level::L3 { NEIGHBOURHOOD } else { Level::L2.size() }) else {
            return Ok(Err(MapError::OutOfRange));
        };
        let mut result = Ok(());
        let Self { table, host, .. } = self;
        table.host_runs(range, &mut |run, usage| {
            result = result.and_then(|()| host.map(machine, tables, run.identity_ipa(), run.base(), usage));
        });
        Ok(result)
    }
}
