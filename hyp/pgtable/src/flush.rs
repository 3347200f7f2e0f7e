//! What has been taken out of a table and not yet out of the TLBs.

use ravelin_memory::{PageRange, PhysAddr};

use crate::Regime;

/// A debt of TLB maintenance, paid by [`PageTable::flush`](crate::PageTable::flush).
///
/// Until then the TLBs may hold what was unmapped, blocks that are being split stay unmapped, and tables taken out of
/// the tree are not given back.
#[must_use = "what was unmapped stays in the TLBs until it is flushed"]
pub struct Flush<R: Regime> {
    /// First and last page in between which anything was unmapped.
    pub(crate) span: Option<PageRange<R::Space>>,
    /// Whether a table descriptor was taken out.
    pub(crate) tables: bool,
    /// Whether blocks were broken of which a part stays mapped.
    pub(crate) pending: bool,
    /// Tables taken out of the tree: the first; each holds the address of the next in its entry 0, where 0 is the end. A
    /// page address has bit 0 clear, so a walker that still gets there finds an invalid descriptor.
    pub(crate) detached: PhysAddr,
}

impl<R: Regime> Flush<R> {
    /// Returns a flush that owes nothing.
    pub const fn new() -> Self {
        Self { span: None, tables: false, pending: false, detached: PhysAddr::from_bits_truncating(0) }
    }

    /// Returns whether nothing has to be flushed.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.span.is_none()
    }

    /// Widens the span by `range`.
    pub(crate) fn add(&mut self, range: PageRange<R::Space>) {
        self.span = Some(match self.span {
            None => range,
            Some(span) => {
                let base = span.base().min(range.base());
                PageRange::from_bounds(base.raw(), span.end().max(range.end())).unwrap_or(range)
            }
        });
    }
}

impl<R: Regime> Default for Flush<R> {
    fn default() -> Self {
        Self::new()
    }
}
