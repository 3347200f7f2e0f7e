//! The host's device tree: Ravelin's own with a few edits, streamed from one buffer to the other.
//!
//! dtoolkit can change properties in place, but it cannot add nodes without an allocator, and on the way it trusts a
//! strings block that its validation does not look at as a whole. The edits are few and local, so one pass that copies
//! the tokens of the structure block and changes some of them is simpler, and checks every access.

use ravelin_memory::{PAGE_SIZE, PhysRange};

use crate::{
    DtbError, Fault, Platform,
    cells::{CellCounts, pairs},
    chosen::is_module,
    memory::is_memory,
};

/// The size of the largest device tree that a host may get, in bytes (Linux, `Documentation/arch/arm64/booting.rst`).
pub const MAX_HOST_DTB_SIZE: usize = 2 << 20;

/// Room that is left in the host's device tree, in bytes, for firmware that edits it in place.
pub const SLACK: usize = 16 << 10;

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// Bytes of the header, which the reservation block follows.
const HEADER_SIZE: usize = 40;

/// Names of the properties that are added, in one piece for the strings block.
const NAMES: &[u8] =
    b"#address-cells\0#size-cells\0ranges\0reg\0no-map\0bootargs\0linux,initrd-start\0linux,initrd-end\0";

/// Room for what the edits add besides the host's command line, in bytes: two nodes and four properties with their names, a
/// reservation block, and a few cells more in a memory node.
const ADDED: u64 = 4 << 10;

impl Platform<'_> {
    /// Returns the pages that [`Platform::write_host_dtb`] needs at most, in bytes; at most [`MAX_HOST_DTB_SIZE`].
    pub(crate) fn host_dtb_room(&self) -> u64 {
        /// Offsets of `size_dt_strings` and `size_dt_struct` in the header.
        const BLOCKS: [usize; 2] = [32, 36];
        let field = |offset: usize| self.fdt().data().get(offset..)?.first_chunk().copied().map(u32::from_be_bytes);
        let blocks = BLOCKS.iter().filter_map(|&offset| field(offset)).map(u64::from);
        let more = [self.kernel.bootargs.len(), SLACK].map(|size| u64::try_from(size).unwrap_or(u64::MAX));
        let limit = u64::try_from(MAX_HOST_DTB_SIZE).unwrap_or(u64::MAX);
        let room = blocks.chain(more).fold(ADDED, u64::saturating_add).min(limit);
        room.checked_next_multiple_of(PAGE_SIZE).unwrap_or(limit)
    }

    /// Writes the device tree for the host to the front of `out` and returns its size in bytes.
    ///
    /// It is the one that the platform was read from, except that the carve-out is neither in a memory node nor without
    /// a `no-map` node in `/reserved-memory`, and that `/chosen` has the host's command line and ramdisk in place of
    /// Ravelin's command line and the modules. [`SLACK`] bytes are free at its end.
    ///
    /// # Errors
    ///
    /// Blames the root if `out` is too small or if the result were larger than [`MAX_HOST_DTB_SIZE`].
    pub fn write_host_dtb(&self, carve_out: PhysRange, out: &mut [u8]) -> Result<usize, DtbError> {
        let blame = |fault: Fault| fault.at(["/"]);
        let cells = CellCounts::of(self.fdt().root(), CellCounts::DEFAULT).map_err(blame)?;
        let source = Source::new(self.fdt().data()).ok_or(Fault::Malformed("header")).map_err(blame)?;
        let editor = Editor { platform: self, source: &source, cells, carve_out };
        let size = out.len();
        editor.write(&mut Sink { out, at: 0 }).ok_or_else(|| {
            blame(Fault::NoRoom { what: "the device tree", size: u64::try_from(size).unwrap_or(u64::MAX) })
        })
    }
}

/// The blocks of the device tree that is copied. That they are sound has been checked when it was parsed, but nothing
/// here relies on that.
struct Source<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
    boot_cpu: u32,
}

impl<'a> Source<'a> {
    fn new(data: &'a [u8]) -> Option<Self> {
        let field = |offset: usize| data.get(offset..)?.first_chunk().copied().map(u32::from_be_bytes);
        let offset = |at| usize::try_from(field(at)?).ok();
        let strings = data.get(offset(12)?..)?.get(..offset(32)?)?;
        Some(Self { structure: data.get(offset(8)?..)?, strings, boot_cpu: field(28)? })
    }

    fn tokens(&self) -> Tokens<'a> {
        Tokens { rest: self.structure, strings: self.strings }
    }
}

/// A token of the structure block.
#[derive(Clone, Copy)]
enum Token<'a> {
    Begin { name: &'a [u8] },
    EndNode,
    Prop { name: &'a [u8], value: &'a [u8] },
    End,
}

/// The tokens from some place on, each with the bytes that it is made of. Padding tokens are left out.
#[derive(Clone)]
struct Tokens<'a> {
    rest: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Tokens<'a> {
    /// Takes the next cell.
    fn cell(&mut self) -> Option<u32> {
        let (cell, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u32::from_be_bytes(*cell))
    }

    /// Takes `len` bytes and what pads them to whole cells.
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, _) = self.rest.split_at_checked(len)?;
        self.rest = self.rest.get(len.checked_next_multiple_of(4)?..)?;
        Some(bytes)
    }

    fn next(&mut self) -> Option<(Token<'a>, &'a [u8])> {
        loop {
            let start = self.rest;
            let token = match self.cell()? {
                BEGIN_NODE => {
                    let len = self.rest.iter().position(|byte| *byte == 0)?;
                    let name = self.bytes(len.checked_add(1)?)?.get(..len)?;
                    Token::Begin { name }
                }
                END_NODE => Token::EndNode,
                PROP => {
                    let len = usize::try_from(self.cell()?).ok()?;
                    let name = self.strings.get(usize::try_from(self.cell()?).ok()?..)?;
                    let name = name.split(|byte| *byte == 0).next()?;
                    Token::Prop { name, value: self.bytes(len)? }
                }
                NOP => continue,
                END => Token::End,
                _ => return None,
            };
            return Some((token, start.get(..start.len().checked_sub(self.rest.len())?)?));
        }
    }

    /// Returns the value of a property of the node whose beginning was the last token.
    fn property(&self, wanted: &[u8]) -> Option<&'a [u8]> {
        let mut ahead = self.clone();
        while let (Token::Prop { name, value }, _) = ahead.next()? {
            if name == wanted {
                return Some(value);
            }
        }
        None
    }

    /// Goes behind the node whose beginning was the last token.
    fn skip_node(&mut self) -> Option<()> {
        let mut depth = 1_u32;
        while depth > 0 {
            match self.next()?.0 {
                Token::Begin { .. } => depth = depth.checked_add(1)?,
                Token::EndNode => depth = depth.checked_sub(1)?,
                Token::Prop { .. } => {}
                Token::End => return None,
            }
        }
        Some(())
    }
}

/// The buffer that is written, from its front on.
struct Sink<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Sink<'_> {
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.at.checked_add(bytes.len())?;
        self.out.get_mut(self.at..end)?.copy_from_slice(bytes);
        self.at = end;
        Some(())
    }

    fn zeros(&mut self, count: usize) -> Option<()> {
        let end = self.at.checked_add(count)?;
        self.out.get_mut(self.at..end)?.fill(0);
        self.at = end;
        Some(())
    }

    fn cell(&mut self, cell: u32) -> Option<()> {
        self.put(&cell.to_be_bytes())
    }

    /// Writes a number in one or two cells.
    fn number(&mut self, number: u64, cells: u32) -> Option<()> {
        match cells {
            1 => self.cell(u32::try_from(number).ok()?),
            2 => self.put(&number.to_be_bytes()),
            _ => None,
        }
    }

    /// Writes zeros up to a multiple of `align`.
    fn pad(&mut self, align: usize) -> Option<()> {
        self.zeros(self.at.checked_next_multiple_of(align)?.checked_sub(self.at)?)
    }

    /// Begins a node. The name is given in pieces.
    fn begin(&mut self, name: &[&[u8]]) -> Option<()> {
        self.cell(BEGIN_NODE)?;
        for part in name {
            self.put(part)?;
        }
        self.zeros(1)?;
        self.pad(4)
    }
}

/// Which child of the root a token is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Chosen,
    Memory,
    Reserved,
    Other,
}

struct Editor<'a> {
    platform: &'a Platform<'a>,
    source: &'a Source<'a>,
    cells: CellCounts,
    carve_out: PhysRange,
}

impl Editor<'_> {
    /// Writes the whole device tree and returns its size; nothing if it does not fit.
    fn write(&self, sink: &mut Sink<'_>) -> Option<usize> {
        sink.zeros(HEADER_SIZE)?;
        for entry in self.platform.fdt().memory_reservations() {
            sink.number(entry.address(), 2)?;
            sink.number(entry.size(), 2)?;
        }
        sink.zeros(16)?;
        let structure = sink.at;
        self.write_structure(sink)?;
        let strings = sink.at;
        sink.put(self.source.strings)?;
        sink.put(NAMES)?;
        let end = sink.at;
        sink.zeros(SLACK)?;
        sink.pad(8)?;
        let total = sink.at;
        if total > MAX_HOST_DTB_SIZE {
            return None;
        }

        sink.at = 0;
        sink.cell(0xd00d_feed)?;
        for field in [total, structure, strings, HEADER_SIZE] {
            sink.cell(u32::try_from(field).ok()?)?;
        }
        sink.cell(17)?;
        sink.cell(16)?;
        sink.cell(self.source.boot_cpu)?;
        sink.cell(u32::try_from(end.checked_sub(strings)?).ok()?)?;
        sink.cell(u32::try_from(strings.checked_sub(structure)?).ok()?)?;
        Some(total)
    }

    fn write_structure(&self, sink: &mut Sink<'_>) -> Option<()> {
        let mut tokens = self.source.tokens();
        let mut depth = 0_u32;
        let mut section = Section::Other;
        let (mut chosen_done, mut reserved_done) = (false, false);
        loop {
            let (token, bytes) = tokens.next()?;
            match token {
                Token::Begin { name } => {
                    depth = depth.checked_add(1)?;
                    if depth == 2 {
                        section = match name {
                            b"chosen" if !chosen_done => Section::Chosen,
                            b"reserved-memory" if !reserved_done => Section::Reserved,
                            _ if is_memory(tokens.property(b"device_type"), tokens.property(b"status")) => {
                                Section::Memory
                            }
                            _ => Section::Other,
                        };
                    }
                    let is_module = depth == 3
                        && section == Section::Chosen
                        && tokens.property(b"compatible").is_some_and(is_module);
                    // A memory node of which nothing is left goes as a whole, because its reg must not be empty.
                    let is_gone = depth == 2
                        && section == Section::Memory
                        && tokens.property(b"reg").is_some_and(|reg| self.remaining(reg).next().is_none());
                    if is_module || is_gone {
                        tokens.skip_node()?;
                        depth = depth.checked_sub(1)?;
                        continue;
                    }
                    sink.put(bytes)?;
                    if depth == 2 && section == Section::Chosen {
                        self.write_chosen(sink)?;
                        chosen_done = true;
                    }
                    if depth == 2 && section == Section::Reserved && tokens.property(b"ranges").is_none() {
                        self.write_property(sink, b"ranges", |_| Some(()))?;
                    }
                }
                Token::EndNode => {
                    if depth == 2 && section == Section::Reserved {
                        self.write_reservation(sink)?;
                        reserved_done = true;
                    }
                    if depth == 1 && !reserved_done {
                        sink.begin(&[b"reserved-memory"])?;
                        self.write_property(sink, b"#address-cells", |sink| sink.cell(self.cells.address))?;
                        self.write_property(sink, b"#size-cells", |sink| sink.cell(self.cells.size))?;
                        self.write_property(sink, b"ranges", |_| Some(()))?;
                        self.write_reservation(sink)?;
                        sink.cell(END_NODE)?;
                    }
                    depth = depth.checked_sub(1)?;
                    sink.put(bytes)?;
                }
                Token::Prop { name, value } => match (depth, section, name) {
                    (2, Section::Chosen, b"bootargs" | b"linux,initrd-start" | b"linux,initrd-end") => {}
                    (2, Section::Memory, b"reg") => self.write_property(sink, name, |sink| {
                        self.remaining(value).try_for_each(|(base, size)| self.write_region(sink, base, size))
                    })?,
                    _ => sink.put(bytes)?,
                },
                Token::End => return sink.put(bytes),
            }
        }
    }

    /// Yields what the carve-out leaves of the regions in a `reg` property.
    fn remaining(&self, reg: &[u8]) -> impl Iterator<Item = (u64, u64)> {
        pairs(reg, self.cells).filter_map(Result::ok).flat_map(|(base, size)| {
            let end = base.saturating_add(size);
            [(base, end.min(self.carve_out.base().raw())), (base.max(self.carve_out.end()), end)]
                .into_iter()
                .filter_map(|(base, end)| Some((base, end.checked_sub(base).filter(|size| *size != 0)?)))
        })
    }

    fn write_region(&self, sink: &mut Sink<'_>, base: u64, size: u64) -> Option<()> {
        sink.number(base, self.cells.address)?;
        sink.number(size, self.cells.size)
    }

    /// Writes the properties of `/chosen` that are the host's.
    fn write_chosen(&self, sink: &mut Sink<'_>) -> Option<()> {
        let bootargs = self.platform.kernel.bootargs;
        if !bootargs.is_empty() {
            self.write_property(sink, b"bootargs", |sink| {
                sink.put(bootargs.as_bytes())?;
                sink.zeros(1)
            })?;
        }
        if let Some(ramdisk) = &self.platform.ramdisk {
            self.write_property(sink, b"linux,initrd-start", |sink| sink.number(ramdisk.bytes.base(), 2))?;
            self.write_property(sink, b"linux,initrd-end", |sink| sink.number(ramdisk.bytes.end(), 2))?;
        }
        Some(())
    }

    /// Writes the node that reserves the carve-out.
    fn write_reservation(&self, sink: &mut Sink<'_>) -> Option<()> {
        let base = self.carve_out.base().raw();
        let mut digits = arrayvec::ArrayString::<16>::new();
        core::fmt::Write::write_fmt(&mut digits, format_args!("{base:x}")).ok()?;
        sink.begin(&[b"ravelin@", digits.as_bytes()])?;
        self.write_property(sink, b"reg", |sink| self.write_region(sink, base, self.carve_out.size()))?;
        self.write_property(sink, b"no-map", |_| Some(()))?;
        sink.cell(END_NODE)
    }

    /// Writes a property whose name is one of [`NAMES`].
    fn write_property(
        &self,
        sink: &mut Sink<'_>,
        name: &[u8],
        value: impl FnOnce(&mut Sink<'_>) -> Option<()>,
    ) -> Option<()> {
        let mut names = NAMES.split_inclusive(|byte| *byte == 0);
        let offset = names.try_fold(self.source.strings.len(), |offset, entry| {
            if entry.strip_suffix(b"\0") == Some(name) { Err(offset) } else { Ok(offset.saturating_add(entry.len())) }
        });
        sink.cell(PROP)?;
        let len_at = sink.at;
        sink.zeros(4)?;
        sink.cell(u32::try_from(offset.err()?).ok()?)?;
        let start = sink.at;
        value(sink)?;
        let len = u32::try_from(sink.at.checked_sub(start)?).ok()?;
        sink.out.get_mut(len_at..)?.first_chunk_mut::<4>()?.copy_from_slice(&len.to_be_bytes());
        sink.pad(4)
    }
}
