//! What a host that is not to be trusted would do: looks for a guest's secret in the guest's memory.
//!
//! The guest has filled some memory with a text of 64 bytes, over and over. The host knows only its complement, so that
//! the text is nowhere in the host's own memory. Every way of the kernel into the memory of a process is tried on all
//! pages, and is to give an error for those that belong to the guest.

use core::ffi::CStr;
use core::fmt::Write;

use crate::report::{self, Message, Text, bail};
use crate::sys::{self, Errno, File, Mapping};

const PAGE: usize = 4096;

/// Bytes of the text; it starts at multiples of this.
const LENGTH: usize = 64;

/// Exit statuses. Anything else is a failure.
const REFUSED: u8 = 0;
const SEEN: u8 = 3;
/// The secret was not seen, but so few pages were refused that it cannot be in them.
const NOT_THERE: u8 = 4;

/// Pages that the guest has filled with it, at least.
const SECRET_PAGES: usize = 256;

/// The text that is looked for.
struct Secret([u8; LENGTH]);

impl Secret {
    /// Parses the complement in hexadecimal.
    fn parse(text: &CStr) -> Option<Self> {
        let text = text.to_str().ok()?;
        let mut complement = [0; LENGTH];
        if text.len() != 2 * LENGTH {
            return None;
        }
        for (index, byte) in complement.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
        }
        Some(Self(complement))
    }

    fn is_in(&self, memory: &[u8]) -> bool {
        let same = |chunk: &[u8]| chunk.iter().zip(&self.0).all(|(byte, complement)| *byte == !complement);
        memory.chunks_exact(LENGTH).any(same)
    }
}

/// What one way has brought.
#[derive(Default)]
struct Loot {
    pages: usize,
    read: usize,
    with_secret: usize,
    refusal: Option<Errno>,
}

impl Loot {
    /// Takes the result for one page.
    fn page(&mut self, result: Result<&[u8], Errno>, secret: &Secret) {
        self.pages += 1;
        match result {
            Ok(bytes) => {
                self.read += usize::from(!bytes.is_empty());
                self.with_secret += usize::from(secret.is_in(bytes));
            }
            Err(errno) => self.refusal = Some(errno),
        }
    }

    fn print(&self, way: &str) {
        let mut refusal = Text::<48>::default();
        if let Some(errno) = self.refusal {
            // What does not fit is left out.
            let _ = write!(refusal, ", the others give {errno}");
        }
        let refusal = core::str::from_utf8(refusal.as_bytes()).unwrap_or("");
        report::line(format_args!(
            "  {way}: {} pages, {} of them can be read, {} with the secret{refusal}\n",
            self.pages, self.read, self.with_secret
        ));
    }
}

/// Looks into the guest of a VMM.
pub(crate) fn process(id: usize, complement: &CStr) -> ! {
    let Some(secret) = Secret::parse(complement) else { sys::exit(2) };
    match look(id, &secret) {
        Ok(status) => sys::exit(status),
        Err(why) => {
            report::line(format_args!("  cannot look: {}\n", core::str::from_utf8(why.as_bytes()).unwrap_or("?")));
            sys::exit(1)
        }
    }
}

/// Looks through all of RAM as the kernel sees it.
pub(crate) fn kernel(complement: &CStr) -> ! {
    let Some(secret) = Secret::parse(complement) else { sys::exit(2) };
    let mut loot = Loot::default();
    let result = crate::kcore::pages(|page| loot.page(page, &secret));
    if let Err(why) = result {
        report::line(format_args!("  /proc/kcore: {}\n", core::str::from_utf8(why.as_bytes()).unwrap_or("?")));
        sys::exit(1)
    }
    loot.print("/proc/kcore");
    let physical = File::open(c"/dev/mem", sys::RDONLY).and_then(|memory| {
        let mut page = [0; PAGE];
        memory.read_at(&mut page, crate::kcore::START_OF_RAM).map(|_| ())
    });
    match physical {
        Ok(()) => report::line(format_args!("  /dev/mem: RAM can be read\n")),
        Err(errno) => report::line(format_args!("  /dev/mem: RAM gives {errno}\n")),
    }
    sys::exit(if loot.with_secret > 0 { SEEN } else { REFUSED })
}

/// Reads the page at an offset into the guest's memory; how many bytes of it there were.
type Way<'a> = dyn FnMut(&mut [u8; PAGE], usize) -> Result<usize, Errno> + 'a;

/// The worst that any way has brought, as an exit status.
fn look(id: usize, secret: &Secret) -> report::Result<u8> {
    let (start, length) = largest_mapping(id)?;
    let mut page = [0; PAGE];
    let (mut seen, mut refused) = (false, true);
    let mut try_all = |way: &str, read: &mut Way<'_>| {
        let mut loot = Loot::default();
        for at in (0..length).step_by(PAGE) {
            let result = read(&mut page, at);
            loot.page(result.map(|size| &page[..size]), secret);
        }
        loot.print(way);
        seen |= loot.with_secret > 0;
        refused &= loot.pages - loot.read >= SECRET_PAGES;
    };

    let memory = File::open(path(id, "mem").terminated(), sys::RDONLY)?;
    try_all("/proc/PID/mem", &mut |page, at| memory.read_at(page, start + at).map(<[u8]>::len));
    try_all("process_vm_readv", &mut |page, at| sys::read_process(id, page, start + at));
    if let Some(file) = memory_file(id, length)? {
        try_all("read of the guest_memfd", &mut |page, at| file.read_at(page, at).map(<[u8]>::len));
        let own = Mapping::shared(&file, length, sys::READ, 0)?;
        let me = sys::process_id()?;
        try_all("another mapping of it", &mut |page, at| sys::read_process(me, page, own.address() + at));
    }
    Ok(match (seen, refused) {
        (true, _) => SEEN,
        (false, true) => REFUSED,
        (false, false) => NOT_THERE,
    })
}

/// A path below `/proc/ID`.
struct Path(Text<48>);

impl Path {
    fn terminated(&self) -> &CStr {
        CStr::from_bytes_until_nul(self.0.as_bytes()).unwrap_or(c"")
    }
}

fn path(id: usize, name: &str) -> Path {
    Path(format_args!("/proc/{id}/{name}\0").into())
}

/// Start and length of a process's largest mapping: a VMM's is the memory of its guest.
fn largest_mapping(id: usize) -> report::Result<(usize, usize)> {
    let mut buffer = [0; 16 << 10];
    let file = File::open(path(id, "maps").terminated(), sys::RDONLY)?;
    let mut filled = 0;
    // It gives a page at most at a time.
    while let read @ 1.. = file.read(&mut buffer[filled..])?.len() {
        filled += read;
    }
    let text = core::str::from_utf8(&buffer[..filled]).unwrap_or("");
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let start = number(start)?;
        Some((start, number(end)?.checked_sub(start)?))
    };
    let largest = text.lines().filter_map(range).max_by_key(|(_, length)| *length);
    largest.ok_or_else(|| Message::from(format_args!("the process has no memory")))
}

/// A file of that size among those that a process has open, taken from it.
fn memory_file(id: usize, length: usize) -> report::Result<Option<File>> {
    const DESCRIPTORS: usize = 256;
    let process = File::of_process(id)?;
    for descriptor in 3..DESCRIPTORS {
        match File::taken(&process, descriptor) {
            Ok(file) if file.size()? == length => return Ok(Some(file)),
            Ok(_) | Err(Errno::BADF) => {}
            Err(errno) => bail!("taking a descriptor: {errno}"),
        }
    }
    Ok(None)
}
