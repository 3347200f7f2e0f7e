//! The kernel's own memory, read through `/proc/kcore`.

use core::ffi::CStr;

use crate::report::{self, bail, check};
use crate::sys::{self, File};

const KCORE: &CStr = c"/proc/kcore";
const PAGE: usize = 4096;

/// Reads a page in every `step` KiB of RAM.
pub(crate) fn run(step: usize) {
    let file = match File::open(KCORE, sys::RDONLY) {
        Ok(file) => file,
        Err(errno) => return check("/proc/kcore", Err(errno.into())),
    };
    check("RAM through /proc/kcore", read(&file, (step * 1024).max(PAGE)));
}

/// The file is an ELF core file whose segments of RAM have a physical address.
fn read(file: &File, step: usize) -> report::Result {
    let mut header = [0; 64];
    let header = file.read_at(&mut header, 0)?;
    let (Some(start), Some(size), Some(count)) = (word(header, 32), half(header, 54), half(header, 56)) else {
        bail!("the header is cut")
    };
    let mut pages = 0;
    for index in 0..count {
        let mut segment = [0; 56];
        let segment = file.read_at(&mut segment, start + index * size)?;
        let fields = [word(segment, 0), word(segment, 8), word(segment, 24), word(segment, 32)];
        let [Some(kind), Some(offset), Some(physical), Some(length)] = fields else { bail!("segment {index} is cut") };
        const LOAD: usize = 1;
        if kind & 0xffff_ffff != LOAD || physical == usize::MAX {
            continue;
        }
        for at in (0..length).step_by(step) {
            let mut page = [0; PAGE];
            match file.read_at(&mut page, offset + at) {
                Ok(read) if !read.is_empty() => pages += 1,
                Ok(_) => bail!("nothing at {:#x}", physical + at),
                Err(errno) => bail!("{errno} at {:#x}", physical + at),
            }
        }
    }
    report::note("pages read through /proc/kcore", format_args!("{pages}"));
    if pages == 0 { bail!("no segment of RAM") } else { Ok(()) }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?).into())
}
