//! The part of QEMU's plugin interface that is used here, version 4 (QEMU 10.0), behind safe types.
//!
//! Declared by hand so that the plugin builds with neither QEMU's nor GLib's headers; QEMU has already loaded GLib.
#![expect(unsafe_code, reason = "the only way to QEMU's C interface")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Identifies the plugin to QEMU.
pub(crate) type PluginId = u64;

/// The version of the interface these declarations follow.
pub(crate) const VERSION: c_int = 4;

/// `qemu_info_t`: what QEMU says of itself on installation.
#[repr(C)]
pub(crate) struct Info {
    target_name: *const c_char,
    version_min: c_int,
    version_current: c_int,
    system_emulation: bool,
    smp_vcpus: c_int,
    max_vcpus: c_int,
}

/// `qemu_plugin_u64`: one counter of every CPU.
#[derive(Clone, Copy)]
#[repr(C)]
struct Entry {
    score: *mut c_void,
    offset: usize,
}

/// `qemu_plugin_reg_descriptor`.
#[repr(C)]
struct Descriptor {
    handle: *mut c_void,
    name: *const c_char,
    feature: *const c_char,
}

/// `GArray` and `GByteArray`, which begin alike.
#[repr(C)]
struct Array<T> {
    data: *mut T,
    len: c_uint,
}

/// `QEMU_PLUGIN_INLINE_ADD_U64`.
const INLINE_ADD: c_int = 0;

/// Which registers a callback may look at: `qemu_plugin_cb_flags`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) enum Access {
    None = 0,
    Read = 1,
}

/// `qemu_plugin_mem_rw`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) enum Direction {
    Load = 1,
    Store = 2,
}

type ExecutionCallback = extern "C" fn(c_uint, *mut c_void);

// As qemu-plugin.h has them, interface version 4.
unsafe extern "C" {
    fn qemu_plugin_register_vcpu_init_cb(id: PluginId, callback: extern "C" fn(PluginId, c_uint));
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: PluginId, callback: extern "C" fn(PluginId, *mut c_void));
    fn qemu_plugin_register_atexit_cb(
        id: PluginId,
        callback: extern "C" fn(PluginId, *mut c_void),
        userdata: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut c_void,
        callback: ExecutionCallback,
        access: Access,
        userdata: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut c_void,
        callback: ExecutionCallback,
        access: Access,
        userdata: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
        instruction: *mut c_void,
        operation: c_int,
        entry: Entry,
        operand: u64,
    );
    fn qemu_plugin_register_vcpu_mem_inline_per_vcpu(
        instruction: *mut c_void,
        direction: Direction,
        operation: c_int,
        entry: Entry,
        operand: u64,
    );
    fn qemu_plugin_tb_n_insns(block: *const c_void) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const c_void) -> u64;
    fn qemu_plugin_tb_get_insn(block: *const c_void, index: usize) -> *mut c_void;
    fn qemu_plugin_insn_data(instruction: *const c_void, destination: *mut c_void, length: usize) -> usize;
    fn qemu_plugin_get_registers() -> *mut Array<Descriptor>;
    fn qemu_plugin_read_register(handle: *mut c_void, buffer: *mut Array<u8>) -> c_int;
    fn qemu_plugin_num_vcpus() -> c_int;
    fn qemu_plugin_scoreboard_new(element_size: usize) -> *mut c_void;
    fn qemu_plugin_request_time_control() -> *const c_void;
    fn qemu_plugin_update_ns(handle: *const c_void, time: i64);
    fn qemu_plugin_u64_add(entry: Entry, cpu: c_uint, added: u64);
    fn qemu_plugin_u64_get(entry: Entry, cpu: c_uint) -> u64;
    fn g_byte_array_new() -> *mut Array<u8>;
    fn g_byte_array_unref(array: *mut Array<u8>);
    fn g_array_unref(array: *mut Array<Descriptor>);
}

/// What is passed to the callbacks of a block or instruction: a number, carried in the pointer.
fn userdata(value: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(value)
}

/// Registers the callbacks that live as long as the plugin. `on_init` runs in each CPU's thread before the CPU does.
pub(crate) fn register(
    id: PluginId,
    on_init: extern "C" fn(PluginId, c_uint),
    on_translation: extern "C" fn(PluginId, *mut c_void),
    on_exit: extern "C" fn(PluginId, *mut c_void),
) {
    // SAFETY: `id` is the one QEMU gave, the callbacks have the types it calls them with and are never unloaded.
    unsafe { qemu_plugin_register_vcpu_init_cb(id, on_init) };
    // SAFETY: as above.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation) };
    // SAFETY: as above; the callback ignores its user data.
    unsafe { qemu_plugin_register_atexit_cb(id, on_exit, userdata(0)) };
}

/// Number of CPUs that QEMU has started so far.
pub(crate) fn cpus() -> c_uint {
    // SAFETY: has no precondition.
    let count = unsafe { qemu_plugin_num_vcpus() };
    c_uint::try_from(count).unwrap_or(0)
}

/// What QEMU passes to `qemu_plugin_install`.
///
/// # Safety
///
/// `info` must point to QEMU's `qemu_info_t`, and `arguments` to `count` C strings, for the length of the call.
pub(crate) unsafe fn installation(
    info: *const Info,
    count: c_int,
    arguments: *const *const c_char,
) -> (String, Vec<String>) {
    let text = |pointer: *const c_char| {
        // SAFETY: the caller vouches for the strings.
        unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
    };
    // SAFETY: the caller vouches for `info`.
    let target = text(unsafe { &*info }.target_name);
    let arguments = (0..usize::try_from(count).unwrap_or(0)).map(|index| {
        // SAFETY: `index` is below `count`.
        let pointer = unsafe { arguments.add(index) };
        // SAFETY: the caller vouches for `count` of them.
        text(unsafe { *pointer })
    });
    (target, arguments.collect())
}

/// Counters of every CPU, which QEMU grows as CPUs appear.
#[derive(Clone, Copy)]
pub(crate) struct Scoreboard(NonNull<c_void>);

// SAFETY: the pointer is an opaque handle, and QEMU's functions on it may be called from any thread.
unsafe impl Send for Scoreboard {}
// SAFETY: as above. Each CPU's counters are written by its own thread only; aligned 64-bit reads do not tear.
unsafe impl Sync for Scoreboard {}

impl Scoreboard {
    /// Creates a scoreboard of `counters` zeroed counters for each CPU.
    pub(crate) fn new(counters: usize) -> Self {
        // SAFETY: any size will do; the scoreboard is never freed.
        let score = unsafe { qemu_plugin_scoreboard_new(counters * size_of::<u64>()) };
        Self(NonNull::new(score).expect("QEMU aborts when it is out of memory"))
    }

    fn entry(self, counter: usize) -> Entry {
        Entry { score: self.0.as_ptr(), offset: counter * size_of::<u64>() }
    }

    /// Adds 1 to a counter of the CPU whose thread this is.
    pub(crate) fn increment(self, cpu: c_uint, counter: usize) {
        assert!(cpu < cpus());
        // SAFETY: the CPU exists and callers use the counters that the scoreboard was made for.
        unsafe { qemu_plugin_u64_add(self.entry(counter), cpu, 1) }
    }

    /// Reads a counter of any CPU.
    pub(crate) fn get(self, cpu: c_uint, counter: usize) -> u64 {
        assert!(cpu < cpus());
        // SAFETY: as for `increment`.
        unsafe { qemu_plugin_u64_get(self.entry(counter), cpu) }
    }
}

/// Control of the machine's time. The clock stays what it is; only what comes with setting it is of use.
#[derive(Clone, Copy)]
pub(crate) struct TimeControl(NonNull<c_void>);

// SAFETY: the pointer is an opaque handle, and QEMU's function on it may be called from any CPU's thread.
unsafe impl Send for TimeControl {}
// SAFETY: as above.
unsafe impl Sync for TimeControl {}

impl TimeControl {
    /// Returns `None` if there is another plugin that has it.
    pub(crate) fn request() -> Option<Self> {
        // SAFETY: has no precondition.
        NonNull::new(unsafe { qemu_plugin_request_time_control() }.cast_mut()).map(Self)
    }

    /// Makes the CPU whose thread this is leave its loop after the present block. If the thread runs all CPUs, the next one
    /// goes on.
    pub(crate) fn end_turn(self) {
        // Time is set outside of the loop, but never back.
        // SAFETY: the handle is QEMU's, and a CPU's thread is running this, as the callers see to.
        unsafe { qemu_plugin_update_ns(self.0.as_ptr(), 0) };
    }
}

/// A block of instructions that is being translated; it lives as long as the callback that got it.
pub(crate) struct Block<'a>(*mut c_void, PhantomData<&'a ()>);

impl Block<'_> {
    /// # Safety
    ///
    /// `block` must be what QEMU passed to a translation callback that is still running.
    pub(crate) unsafe fn new(block: *mut c_void) -> Self {
        Self(block, PhantomData)
    }

    /// Virtual address of the first instruction.
    pub(crate) fn address(&self) -> u64 {
        // SAFETY: the block is alive.
        unsafe { qemu_plugin_tb_vaddr(self.0) }
    }

    /// The instructions in order.
    pub(crate) fn instructions(&self) -> impl Iterator<Item = Instruction<'_>> {
        // SAFETY: the block is alive.
        let count = unsafe { qemu_plugin_tb_n_insns(self.0) };
        (0..count).map(|index| {
            // SAFETY: `index` is below the number of instructions.
            Instruction(unsafe { qemu_plugin_tb_get_insn(self.0, index) }, PhantomData)
        })
    }

    /// Calls `callback(cpu, data)` before each execution of the block.
    pub(crate) fn call(&self, callback: ExecutionCallback, access: Access, data: usize) {
        // SAFETY: the block is alive; the callback takes its data as a number.
        unsafe { qemu_plugin_register_vcpu_tb_exec_cb(self.0, callback, access, userdata(data)) }
    }
}

/// An instruction of a [`Block`].
pub(crate) struct Instruction<'a>(*mut c_void, PhantomData<&'a ()>);

impl Instruction<'_> {
    /// The instruction word; `None` for the short ones of AArch32.
    pub(crate) fn word(&self) -> Option<u32> {
        let mut bytes = [0; 4];
        // SAFETY: the instruction is alive, and `bytes` has the length given.
        let length = unsafe { qemu_plugin_insn_data(self.0, bytes.as_mut_ptr().cast(), bytes.len()) };
        (length == bytes.len()).then(|| u32::from_le_bytes(bytes))
    }

    /// Calls `callback(cpu, data)` before each execution.
    pub(crate) fn call(&self, callback: ExecutionCallback, access: Access, data: usize) {
        // SAFETY: the instruction is alive; the callback takes its data as a number.
        unsafe { qemu_plugin_register_vcpu_insn_exec_cb(self.0, callback, access, userdata(data)) }
    }

    /// Adds 1 to `counter` of the executing CPU before each execution.
    pub(crate) fn count(&self, board: Scoreboard, counter: usize) {
        // SAFETY: the instruction is alive, and the scoreboard is never freed.
        unsafe {
            qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(self.0, INLINE_ADD, board.entry(counter), 1);
        }
    }

    /// Adds 1 to `counter` of the executing CPU for each load or store that the instruction completes.
    pub(crate) fn count_accesses(&self, direction: Direction, board: Scoreboard, counter: usize) {
        // SAFETY: as for `count`.
        unsafe {
            qemu_plugin_register_vcpu_mem_inline_per_vcpu(self.0, direction, INLINE_ADD, board.entry(counter), 1);
        }
    }
}

/// A CPU register as the debugger sees it.
pub(crate) struct Register(*mut c_void);

// SAFETY: the pointer is an opaque number that QEMU gives for a register, the same for every CPU of one model.
unsafe impl Send for Register {}
// SAFETY: as above.
unsafe impl Sync for Register {}

impl Register {
    /// Finds a register by its name in GDB's description of the CPU. To be called in a CPU's thread.
    pub(crate) fn find(name: &str) -> Option<Self> {
        // SAFETY: a CPU's thread is running this, as the callers see to.
        let array = unsafe { qemu_plugin_get_registers() };
        // SAFETY: QEMU returns a live array.
        let Array { data, len } = *unsafe { &*array };
        // SAFETY: GLib keeps `len` descriptors at `data` for as long as the array lives.
        let descriptors = unsafe { std::slice::from_raw_parts(data, usize::try_from(len).unwrap_or(0)) };
        let found = descriptors.iter().find(|descriptor| {
            // SAFETY: QEMU lists named registers only, and their names are interned.
            let candidate = unsafe { CStr::from_ptr(descriptor.name) };
            candidate.to_bytes() == name.as_bytes()
        });
        let register = found.map(|descriptor| Self(descriptor.handle));
        // SAFETY: the array came with a reference, and nothing points into it any more.
        unsafe { g_array_unref(array) };
        register
    }

    /// Reads the register of the CPU whose thread this is, in a translation callback or one with [`Access::Read`].
    pub(crate) fn read(&self) -> u64 {
        // SAFETY: has no precondition.
        let buffer = unsafe { g_byte_array_new() };
        // SAFETY: the handle is QEMU's, the buffer alive, and a CPU's thread is running this.
        unsafe { qemu_plugin_read_register(self.0, buffer) };
        // SAFETY: the buffer is alive.
        let Array { data, len } = *unsafe { &*buffer };
        let mut bytes = [0; 8];
        let length = bytes.len().min(usize::try_from(len).unwrap_or(0));
        if length > 0 {
            // SAFETY: GLib keeps `len` bytes at `data` for as long as the buffer lives.
            bytes[..length].copy_from_slice(unsafe { std::slice::from_raw_parts(data, length) });
        }
        // SAFETY: the buffer came with a reference, and nothing points into it any more.
        unsafe { g_byte_array_unref(buffer) };
        // QEMU gives registers in the guest's byte order.
        u64::from_le_bytes(bytes)
    }
}
