//! The kernel's own memory, read through `/proc/kcore`.

use core::ffi::CStr;

use crate::report::{self, bail, check};
use crate::sys::{self, Errno, File};

const KCORE: &CStr = c"/proc/kcore";
const PAGE: usize = 4096;

/// Where QEMU's virt machine has its RAM.
pub(crate) const START_OF_RAM: usize = 0x4000_0000;

/// Reads a page in every `step` KiB of RAM.
pub(crate) fn run(step: usize) {
    let mut pages = 0;
    let count = |page: Result<&[u8], Errno>, physical: usize| match page {
        Ok([_, ..]) => {
            pages += 1;
            Ok(())
        }
        Ok([]) => bail!("nothing at {physical:#x}"),
        Err(errno) => bail!("{errno} at {physical:#x}"),
    };
    let result = read::<PAGE>((step * 1024).max(PAGE), count);
    report::note("pages read through /proc/kcore", format_args!("{pages}"));
    check("RAM through /proc/kcore", result);
}

/// Hands all pages of RAM to `take`.
pub(crate) fn pages(mut take: impl FnMut(Result<&[u8], Errno>)) -> report::Result {
    // Many at once: looking up where they are takes longer than copying them.
    read::<{ 16 * PAGE }>(16 * PAGE, |pages, _| {
        match pages {
            Ok(pages) => pages.chunks(PAGE).for_each(|page| take(Ok(page))),
            Err(errno) => take(Err(errno)),
        }
        Ok(())
    })
}

/// In every `step` bytes of RAM, the first `SIZE` are read. The file is an ELF core file whose segments of RAM have a
/// physical address.
fn read<const SIZE: usize>(
    step: usize,
    mut take: impl FnMut(Result<&[u8], Errno>, usize) -> report::Result,
) -> report::Result {
    let file = File::open(KCORE, sys::RDONLY)?;
    let mut header = [0; 64];
    let header = file.read_at(&mut header, 0)?;
    let (Some(start), Some(size), Some(count)) = (word(header, 32), half(header, 54), half(header, 56)) else {
        bail!("the header is cut")
    };
    let mut any = false;
    for index in 0..count {
        let mut segment = [0; 56];
        let segment = file.read_at(&mut segment, start + index * size)?;
        let fields = [word(segment, 0), word(segment, 8), word(segment, 24), word(segment, 32)];
        let [Some(kind), Some(offset), Some(physical), Some(size)] = fields else { bail!("segment {index} is cut") };
        const LOAD: usize = 1;
        if kind & 0xffff_ffff != LOAD || physical == usize::MAX {
            continue;
        }
        for at in (0..size).step_by(step) {
            let mut bytes = [0; SIZE];
            let wanted = SIZE.min(size - at);
            take(file.read_at(&mut bytes[..wanted], offset + at), physical + at)?;
            any = true;
        }
    }
    if any { Ok(()) } else { bail!("no segment of RAM") }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?).into())
}
