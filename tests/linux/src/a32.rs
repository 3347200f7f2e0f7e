//! A program for the 32-bit state that loads from `/dev/mem`: aborts from there take a vector of their own.

use core::ffi::CStr;

use crate::report::{self, bail};
use crate::sys::{self, CREAT, End, Errno, File, TRUNC, WRONLY, number};

/// Where it is mapped.
const BASE: u32 = 0x1_0000;

/// Sizes of the ELF header and of two program headers (System V ABI, 32-bit objects).
const HEADERS: usize = 52 + 2 * 32;

/// The code, in A32; its numbers of system calls are those of the 32-bit ABI.
const CODE: [u32; 18] = [
    0xe28f_0040, // add r0, pc, #64: the path
    0xe59f_1034, // ldr r1, flags
    0xe3a0_7005, // mov r7, #5: open
    0xef00_0000, // svc #0
    0xe1a0_4000, // mov r4, r0
    0xe3a0_0000, // mov r0, #0
    0xe3a0_1a01, // mov r1, #4096
    0xe3a0_2003, // mov r2, #3: to read and write
    0xe3a0_3001, // mov r3, #1: shared
    0xe59f_5018, // ldr r5, page
    0xe3a0_70c0, // mov r7, #192: mmap2
    0xef00_0000, // svc #0
    0xe590_1000, // ldr r1, [r0]
    0xe3a0_0000, // mov r0, #0
    0xe3a0_7001, // mov r7, #1: exit
    0xef00_0000, // svc #0
    0,           // flags
    0,           // page
];

/// What it opens.
const PATH: &CStr = c"/dev/mem";

const FILE: &CStr = c"/tmp/a32";

/// The program, which touches the page of that number.
fn program(page: u32) -> [u8; HEADERS + CODE.len() * 4 + 16] {
    let mut file = [0; HEADERS + CODE.len() * 4 + 16];
    let size = u32::try_from(file.len()).unwrap_or(0);
    let entry = BASE + u32::try_from(HEADERS).unwrap_or(0);
    file[..8].copy_from_slice(b"\x7fELF\x01\x01\x01\0");
    let mut put = |offset: usize, word: u32| file[offset..][..4].copy_from_slice(&word.to_le_bytes());
    const EXECUTABLE_FOR_ARM: u32 = 2 | 40 << 16;
    const EABI5: u32 = 0x0500_0000;
    for (index, word) in [EXECUTABLE_FOR_ARM, 1, entry, 52, 0, EABI5, 52 | 32 << 16, 2].into_iter().enumerate() {
        put(16 + index * 4, word);
    }
    const LOAD: u32 = 1;
    const READ_EXECUTE: u32 = 5;
    for (index, word) in [LOAD, 0, BASE, BASE, size, size, READ_EXECUTE, 4096].into_iter().enumerate() {
        put(52 + index * 4, word);
    }
    const STACK: u32 = 0x6474_e551;
    const READ_WRITE: u32 = 6;
    for (index, word) in [STACK, 0, 0, 0, 0, 0, READ_WRITE, 16].into_iter().enumerate() {
        put(52 + 32 + index * 4, word);
    }
    let mut code = CODE;
    // The 32-bit ABI has the numbers of O_SYNC and O_RDWR, too.
    code[16] = u32::try_from(sys::RDWR | sys::SYNC).unwrap_or(0);
    code[17] = page;
    for (index, word) in code.into_iter().enumerate() {
        put(HEADERS + index * 4, word);
    }
    file[HEADERS + CODE.len() * 4..][..PATH.count_bytes()].copy_from_slice(PATH.to_bytes());
    file
}

/// How the program ends that loads from a physical address, if it can be run.
pub(crate) fn load(address: usize) -> report::Result<Option<End>> {
    let Ok(page) = u32::try_from(address / 4096) else { bail!("{address:#x} is too high") };
    File::open(FILE, WRONLY | CREAT | TRUNC)?.write(&program(page))?;
    // What execve(2) replies has its place outside the statuses of the program itself.
    const CANNOT_RUN: u8 = 100;
    let arguments = [FILE.as_ptr() as usize, 0];
    let end = sys::in_child(|| {
        // SAFETY: Replaces this program, or fails.
        match unsafe { sys::call(number::EXECVE, [FILE.as_ptr() as usize, arguments.as_ptr() as usize, 0, 0, 0, 0]) } {
            Err(Errno::NOEXEC) => CANNOT_RUN,
            _ => 101,
        }
    })?;
    Ok((end != End::Exited(u32::from(CANNOT_RUN))).then_some(end))
}
