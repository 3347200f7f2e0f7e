//! Another kernel in the place of this one.

use crate::report::{self, bail};
use crate::sys::{self, File, Mapping, RDONLY, number};

/// Where the new kernel and what else it is given go, in the RAM of any machine of these tests: 2 MiB aligned, as the
/// boot protocol wants the kernel (Linux, `Documentation/arch/arm64/booting.rst`).
const KERNEL: usize = 0x5000_0000;
const TREE: usize = 0x5800_0000;
const ENTRY: usize = 0x5820_0000;

/// Room for the kernel, its variables included, and for what follows.
const END: usize = 0x5830_0000;

/// What the new kernel is entered by: this one passes nothing on.
const ENTRY_CODE: [u32; 6] = [
    0x5800_00c0, // ldr x0, 1f: the device tree
    0xaa1f_03e1, // mov x1, xzr
    0xaa1f_03e2, // mov x2, xzr
    0xaa1f_03e3, // mov x3, xzr
    0x5800_0084, // ldr x4, 2f: the kernel
    0xd61f_0080, // br x4
                 // 1: .quad TREE, 2: .quad KERNEL
];

/// A part of the new image as kexec_load(2) takes it: the buffer and its size, the address and the size there.
type Segment = [usize; 4];

/// Starts `/root/kernel` with `/root/initrd` and this kernel's device tree. Returns only if that fails.
pub(crate) fn run() {
    if let Err(why) = load_and_start() {
        report::check("kexec", Err(why));
    }
}

fn load_and_start() -> report::Result {
    let chosen = |path| -> report::Result<usize> {
        let mut buffer = [0; 8];
        match *sys::read_file(path, &mut buffer)? {
            [a, b, c, d] => Ok(u32::from_be_bytes([a, b, c, d]) as usize),
            _ => Ok(usize::from_be_bytes(buffer)),
        }
    };
    // The device tree stays as it is, so the initrd goes where this kernel's was; it is smaller.
    let initrd_start = chosen(c"/proc/device-tree/chosen/linux,initrd-start")?;
    let initrd_end = chosen(c"/proc/device-tree/chosen/linux,initrd-end")?;
    if initrd_start < END && KERNEL < initrd_end {
        bail!("the initrd is in the way: {initrd_start:#x}");
    }
    let (kernel, kernel_size) = load(&File::open(c"/root/kernel", RDONLY)?)?;
    let (initrd, initrd_size) = load(&File::open(c"/root/initrd", RDONLY)?)?;
    let (tree, tree_size) = load(&File::open(c"/sys/firmware/fdt", RDONLY)?)?;
    let mut entry = [0_u32; 10];
    entry[..6].copy_from_slice(&ENTRY_CODE);
    for (index, address) in [TREE, KERNEL].into_iter().enumerate() {
        entry[6 + index * 2] = u32::try_from(address).unwrap_or(0);
    }
    let pages = |size: usize| size.next_multiple_of(4096);
    let segments: [Segment; 4] = [
        [kernel.address(), kernel_size, KERNEL, pages(kernel_size)],
        [tree.address(), tree_size, TREE, pages(tree_size)],
        [entry.as_ptr() as usize, size_of_val(&entry), ENTRY, 4096],
        [initrd.address(), initrd_size, initrd_start / 4096 * 4096, pages(initrd_end - initrd_start)],
    ];
    const AARCH64: usize = 183 << 16;
    let arguments = [ENTRY, segments.len(), segments.as_ptr() as usize, AARCH64, 0, 0];
    // SAFETY: Reads the segments.
    unsafe { sys::call(number::KEXEC_LOAD, arguments) }?;
    const MAGIC: [usize; 2] = [0xfee1_dead, 0x2812_1969];
    const RESTART_LOADED: usize = 0x4558_4543;
    // SAFETY: Ends this program with its kernel, or fails.
    unsafe { sys::call(number::REBOOT, [MAGIC[0], MAGIC[1], RESTART_LOADED, 0, 0, 0]) }?;
    Ok(())
}

/// Reads a file into fresh memory.
fn load(file: &File) -> report::Result<(Mapping, usize)> {
    const LARGEST: usize = 96 << 20;
    let memory = Mapping::anonymous(LARGEST, sys::READ | sys::WRITE)?;
    // SAFETY: Nothing else points into the mapping, which starts out as zeroes.
    let buffer = unsafe { core::slice::from_raw_parts_mut(memory.start, LARGEST) };
    let mut size = 0;
    loop {
        match file.read(&mut buffer[size..])?.len() {
            0 => return Ok((memory, size)),
            read => size += read,
        }
    }
}
