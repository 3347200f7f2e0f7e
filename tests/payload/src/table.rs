//! The table of tests.

/// A test.
pub struct Test {
    /// Name, as `test=` and the output have it.
    pub name: &'static str,
    /// What holds if it passes.
    pub about: &'static str,
    /// Names of the hypercalls that it tests. The payload checks that it does use them.
    pub calls: &'static [&'static str],
    /// CPUs that it needs.
    pub cpus: usize,
    /// Contiguous free RAM in bytes that it needs, aligned to that size; a power of two.
    pub memory: u64,
    #[cfg(target_os = "none")]
    pub(crate) run: fn() -> Result<(), crate::tests::Failure>,
}

macro_rules! tests {
    ($($module:ident.$function:ident($about:literal $(, calls: [$($call:ident),+])? $(, cpus: $cpus:literal)? $(, memory: $memory:expr)?);)+) => {
        /// All tests, in the order in which they run.
        pub const TESTS: &[Test] = &[$(
            Test {
                name: concat!(stringify!($module), ".", stringify!($function)),
                about: $about,
                calls: &[$($(stringify!($call)),+)?],
                cpus: one_of!($($cpus,)? 1),
                memory: one_of!($($memory,)? 0),
                #[cfg(target_os = "none")]
                run: crate::tests::$module::$function,
            },
        )+];
    };
}

macro_rules! one_of {
    ($first:expr $(, $rest:expr)*) => {
        $first
    };
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

tests! {
    psci.version("PSCI is 1.0 or later and says what it offers");
    psci.entry_state("a CPU enters at EL1h with the MMU off, DAIF masked and the context id in x0", cpus: 2);
    psci.affinity("AFFINITY_INFO knows which CPUs are on", cpus: 2);
    psci.already_on("CPU_ON of a CPU that is on returns ALREADY_ON, by both calls, and leaves it alone", cpus: 2);
    psci.bad_target("CPU_ON and AFFINITY_INFO of a CPU that does not exist return INVALID_PARAMETERS");
    psci.bad_entry("CPU_ON at the carve-out, a device, a hole or an unaligned address is refused", cpus: 2);
    psci.off_and_on("a CPU goes off and on 50 times, by 32-bit and 64-bit calls", cpus: 2);
    psci.race("of two CPUs that turn on a third one, one succeeds and the other learns why not", cpus: 3);
    psci.suspend("CPU_SUSPEND to standby returns when a timer fires");
    psci.features("FEATURES and the calls agree");
}
const _: (u64, u64) = (MIB, GIB);
