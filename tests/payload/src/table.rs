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
    boot.entry_state("the boot CPU enters as Linux's boot protocol says");
    boot.device_tree_at_start_of_ram("the device tree lies where firmware looks for it");
    boot.carve_out_is_announced("the device tree keeps the host off the carve-out, which is not too large");

    discovery.uid("the vendor UID tells that it is Ravelin, whatever the arguments", calls: [UID]);
    discovery.revision("the version of the interface", calls: [REVISION]);
    discovery.features("the calls offered and the limits; an unknown index is INVALID", calls: [FEATURES]);
    discovery.unknown_numbers("numbers that differ in any bit from a call's are NOT_SUPPORTED and change x0 only");
    discovery.upper_half("function identifiers with a dirty upper half are NOT_SUPPORTED");
    discovery.immediate("HVC with an immediate is NOT_SUPPORTED");
    discovery.registers("calls change the registers of their results and no others");
    discovery.vectors("calls keep the SIMD registers", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK]);

    arguments.reserved("flags that are not zero are RESERVED", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN]);
    arguments.unaligned("addresses inside a page are UNALIGNED", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN]);
    arguments.invalid("no pages at all are INVALID", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN]);
    arguments.overflow("ranges beyond 48 bits OVERFLOW", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN]);
    arguments.too_large("ranges above the limit are TOO_LARGE", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN]);
    arguments.page_state("bad arguments of PAGE_STATE", calls: [PAGE_STATE]);
    arguments.statistics("bad arguments of STATISTICS, and pages that it cannot write to", calls: [STATISTICS]);

    ownership.every_call_from_every_state("the table of transitions, cell by cell", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN, PAGE_STATE], memory: 8 * MIB);
    ownership.one_page_spoils_a_range("all or nothing, and the failing page is named", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN], memory: 8 * MIB);
    ownership.first_failure_is_named("of several failing pages the first is named", calls: [SHARE, DONATE], memory: 8 * MIB);
    ownership.carve_out_is_out_of_reach("no call does anything with the carve-out", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN, PAGE_STATE]);
    ownership.devices_do_not_change_hands("what is not RAM is NOT_RAM", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN]);

    contents.kept_when_shared("share, pin, unpin and unshare keep contents", calls: [SHARE, UNSHARE, PIN, UNPIN], memory: 8 * MIB);
    contents.zero_when_taken_back("what is taken back is zero, and its neighbours are untouched", calls: [DONATE, TAKE_BACK], memory: 8 * MIB);
    contents.kept_when_donated("donated pages keep their contents, as someone who sees physical memory confirms", calls: [DONATE], memory: 8 * MIB);

    abort.owned_and_shared_pages("what the host owns or lends it may read, write and execute, at EL1 and EL0", memory: 2 * MIB);
    abort.donated_page("every access to a donated page is aborted", calls: [DONATE, TAKE_BACK], memory: 4 * MIB);
    abort.donated_block("every access to a donated block is aborted", calls: [DONATE, TAKE_BACK], memory: 8 * MIB);
    abort.carve_out_page("every access to the carve-out is aborted");
    abort.whole_carve_out("no page of the carve-out can be read, and the aborts are counted", calls: [STATISTICS]);
    abort.access_across_pages("an access that ends in a page of someone else is aborted", calls: [DONATE], memory: 2 * MIB);
    abort.translation_table("walks through tables in memory of someone else are aborted", calls: [DONATE], memory: 2 * MIB);
    abort.many("all CPUs take hundreds of aborts");
    abort.all_of_ram_is_there("the host can read all of its RAM");

    stale.same_cpu("a donation is seen by the CPU that makes it", calls: [DONATE, TAKE_BACK], memory: 4 * MIB);
    stale.other_cpu("a donation is seen by CPUs that use the page", calls: [DONATE, TAKE_BACK], cpus: 2, memory: 4 * MIB);
    stale.range("a donation of a range is seen by CPUs that use a page of it", calls: [DONATE, TAKE_BACK], cpus: 2, memory: 8 * MIB);
    stale.in_large_block("a donation out of the largest block is seen by CPUs that use the page", calls: [DONATE], cpus: 2, memory: GIB);
    stale.neighbours_stay("pages next to one that changes hands can be read all the time", calls: [DONATE, TAKE_BACK], cpus: 2, memory: 4 * MIB);
    stale.split_keeps_mappings("pages next to one that changes hands stay mapped", calls: [DONATE], memory: 8 * MIB);

    range.sizes("ranges of 1 to 513 pages, in and across blocks", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN], memory: 16 * MIB);
    range.many_blocks("ranges of many blocks", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN], memory: 64 * MIB);
    range.gigabyte("a gigabyte in one call", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK], memory: GIB);
    range.invalidations("sharing needs no invalidation, a donation one, and one for each split", calls: [SHARE, DONATE], memory: 32 * MIB);

    pins.add_up("pins of a page add up and keep it from being unshared", calls: [PIN, UNPIN, UNSHARE], memory: 2 * MIB);
    pins.overlap("pins of overlapping ranges", calls: [PIN, UNPIN, UNSHARE], memory: 8 * MIB);
    pins.limit("more pins than a page can count are refused with LIMIT", calls: [PIN, UNPIN], memory: 2 * MIB);
    pins.from_all_cpus("pins from all CPUs at once", calls: [PIN, UNPIN], memory: 8 * MIB);

    statistics.layout("version, size, and counts that agree with the device tree", calls: [STATISTICS]);
    statistics.page("nothing but the announced bytes is written, and no pin is left", calls: [STATISTICS], memory: 2 * MIB);
    statistics.calls("each use of a call is counted", calls: [FEATURES, STATISTICS], memory: 2 * MIB);
    statistics.events("aborts, SMCs and invalidations are counted", calls: [STATISTICS], memory: 2 * MIB);

    stress.one_winner("of all CPUs that want a page one gets it", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK], memory: 2 * MIB);
    stress.fault_race("CPUs fault on a block that is being split and joined", calls: [DONATE, TAKE_BACK], cpus: 2, memory: 4 * MIB);
    stress.statistics_race("statistics go to a page that another CPU takes away", calls: [STATISTICS, SHARE, UNSHARE, DONATE, TAKE_BACK], cpus: 2, memory: 2 * MIB);
    stress.hotplug("a CPU goes off and on while others make calls", calls: [DONATE, TAKE_BACK], cpus: 3, memory: 2 * MIB);

    bugs.frame_number_overflow("CVE-2026-0028, -0030, -0031", calls: [SHARE, DONATE], memory: 2 * MIB);
    bugs.share_outside_ram("CVE-2026-0032, and donation of what is no memory", calls: [SHARE, DONATE]);
    bugs.region_straddle("a range that starts in one region and ends in another", calls: [SHARE, DONATE]);
    bugs.hypervisor_memory("CVE-2023-21264", calls: [SHARE, DONATE, STATISTICS]);
    bugs.smc_immediate("an SMC with an immediate is no call");
    bugs.function_id_upper_half("a dirty upper half of the function identifier is no call");
    bugs.unaligned_regions("regions that are not multiples of blocks", calls: [DONATE]);
    bugs.pin_underflow("a page released more often than taken", calls: [UNPIN], memory: 2 * MIB);
    bugs.leak_on_failure("failing calls leave neither pins nor tables (as CVE-2026-46147)", calls: [PIN, DONATE], memory: 8 * MIB);
    bugs.leak_in_the_long_run("a thousand rounds leave the totals alone", calls: [DONATE, TAKE_BACK], memory: 8 * MIB);
    bugs.arbitrary_pointers("pointers into the hypervisor in every register", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN, STATISTICS]);

    smc.unknown_functions("functions that are not on the list are NOT_SUPPORTED and change x0 only");
    smc.ffa("FF-A is refused, whatever version is asked for");
    smc.immediate("SMC with an immediate is NOT_SUPPORTED");
    smc.upper_half("function identifiers with a dirty upper half are NOT_SUPPORTED");
    smc.discovery("SMCCC 1.1 and what it offers");
    smc.registers("calls that are relayed keep x4 to x30");

    psci.version("PSCI is 1.0 or later");
    psci.features("FEATURES and the calls agree");
    psci.entry_state("a CPU enters at EL1h with the MMU off, DAIF masked and the context id in x0", cpus: 2);
    psci.affinity("AFFINITY_INFO knows which CPUs are on", cpus: 2);
    psci.already_on("CPU_ON of a CPU that is on returns ALREADY_ON and leaves it alone", cpus: 2);
    psci.bad_target("CPU_ON and AFFINITY_INFO of a CPU that does not exist return INVALID_PARAMETERS");
    psci.bad_entry("CPU_ON in the carve-out, a donated page, a device, a hole or at an unaligned address is refused", cpus: 2);
    psci.off_and_on("a CPU goes off and on 50 times, by 32-bit and 64-bit calls", cpus: 2);
    psci.race("of two CPUs that turn on a third one, one succeeds and the other learns why not", cpus: 3);
    psci.boot_cpu("the boot CPU goes off and another one turns it on again", cpus: 2);
    psci.suspend("CPU_SUSPEND returns when a timer fires, and never to memory of someone else");

    device.known_devices("UART, GIC, flash and PCI are reachable");
    device.nobody_home("space where no device answers kills nobody");
    device.warm("a device costs no faults once it has been used");
    device.not_executable("code does not run from devices");

    features.basics("FP, SIMD, timers, GIC registers and maintenance");
    features.time("the virtual counter is the physical one");
    features.debug_and_pmu("debug and performance registers");
    features.pointer_authentication("pointer authentication, if offered");
    features.scalable_vectors("SVE and SME, if offered");
    features.memory_tagging("MTE, if offered and only then (CVE-2026-0038)");
    features.extensions("later extensions, if offered");
    features.waiting("WFE comes back");

    guests.life_cycle("a VM of each kind is made, runs, ends, and all pages come back", calls: [VM_SIZES, VM_CREATE, VM_DONATE_TABLES, VCPU_CREATE, VM_MAP, VM_SEAL, VCPU_RUN, VM_TEARDOWN, VM_RECLAIM, VM_DESTROY], memory: 4 * MIB);
    guests.runs_to_its_end("a guest ends its VM, and does not run again", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.ends_for_all_vcpus("a vCPU that ends its VM ends all of them, and each says so once", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.ends_for_vcpus_that_run("so it does those that run on other CPUs", calls: [VCPU_RUN], cpus: 2, memory: 4 * MIB);
    guests.registers_by_number("the host of an ordinary VM gets and sets its registers", calls: [VCPU_GET_REGISTER, VCPU_SET_REGISTER], memory: 4 * MIB);
    guests.registers_without_a_vm("what a guest's system registers hold at first is said before there is one", calls: [REGISTER_RESET_VALUE, VCPU_GET_REGISTER], memory: 4 * MIB);
    guests.registers_that_are_fixed("ID registers keep their values, EL2 and AArch32 are no modes, and other numbers are no registers", calls: [VCPU_GET_REGISTER, VCPU_SET_REGISTER], memory: 4 * MIB);
    guests.registers_before_the_seal("registers and power that are set before the seal are those that vCPUs start with", calls: [VCPU_GET_REGISTER, VCPU_SET_REGISTER, VM_SEAL], memory: 4 * MIB);
    guests.counter_of_a_guest("the virtual counter and its timer go by what the host says", calls: [VCPU_GET_REGISTER, VCPU_SET_REGISTER], memory: 4 * MIB);
    guests.registers_of_protected_vms("registers of protected VMs are closed to the host", calls: [VCPU_GET_REGISTER, VCPU_SET_REGISTER], memory: 4 * MIB);
    guests.steps_out_of_order("each call at each point of a VM's life where it is out of order", calls: [VM_DONATE_TABLES, VCPU_CREATE, VM_MAP, VM_UNMAP, VM_SEAL, VCPU_RUN, VCPU_GET_REGISTER, VCPU_SET_REGISTER, VM_TEARDOWN, VM_RECLAIM, VM_DESTROY, CLAIM, RELEASE, SPI], memory: 4 * MIB);
    guests.bad_arguments("arguments that no call about VMs takes", calls: [VM_SIZES, REGISTER_RESET_VALUE, VM_CREATE, VCPU_CREATE, VM_MAP, VM_SEAL, CLAIM, RELEASE, VM_UNMAP, VM_RECLAIM, FORCE_RECLAIM, SPI], memory: 4 * MIB);
    guests.vcpus_that_are_not_made("vCPUs that cannot be made leave no page and no pin behind", calls: [VCPU_CREATE], memory: 4 * MIB);
    guests.handles("handles that are forged, or of VMs that are gone, name no VM", memory: 4 * MIB);
    guests.all_slots("255 VMs at once, and not one more", calls: [VM_CREATE, VM_DESTROY], memory: 32 * MIB);
    guests.all_vcpus("a VM with 128 vCPUs", calls: [VCPU_CREATE, VCPU_RUN], memory: 8 * MIB);
    guests.ten_thousand_lives("10,000 VMs come and go, and no page is lost", calls: [VM_CREATE, VM_DESTROY], memory: 4 * MIB);
    guests.populate("pages and blocks are put into VMs", calls: [VM_MAP], memory: 16 * MIB);
    guests.conversion_in_place("share, claim, release, unshare: contents stay, and the host has access while it claims", calls: [CLAIM, RELEASE], memory: 4 * MIB);
    guests.conversion_of_blocks("the same for blocks of 2 MiB and parts of them", calls: [CLAIM, RELEASE], memory: 16 * MIB);
    guests.bounded_work("a call does 512 pages, or any number that are blocks, and says how many are done", calls: [CLAIM, RELEASE], memory: 32 * MIB);
    guests.invalidations("conversions that need no TLB invalidation have none", calls: [CLAIM, RELEASE], memory: 16 * MIB);
    guests.unshare_of_claimed_pages("the host is asked for what it has claimed, and releases it", calls: [RELEASE, VCPU_RUN], memory: 8 * MIB);
    guests.refused_unshare("the host refuses to release: the guest is told, and nothing has changed", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.answers_that_do_not_belong("answers that do not belong to the exit are INVALID", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.relinquish("what a guest gives up is zeroed, and may be replaced", memory: 8 * MIB);
    guests.relinquish_of_poison("what was taken by force may be replaced once the guest has given it up", calls: [FORCE_RECLAIM, VM_MAP], memory: 16 * MIB);
    guests.relinquish_again_and_again("a page of a block that is given up 512 times", memory: 8 * MIB);
    guests.force_reclaim_poisons("what is taken by force is zeroed, and never replaced", calls: [FORCE_RECLAIM], memory: 8 * MIB);
    guests.force_reclaim_of_offered_pages("so is what the guest has offered, but not what the host has claimed", calls: [FORCE_RECLAIM], memory: 8 * MIB);
    guests.force_reclaim_while_the_guest_unshares("a guest that wants a page back that is taken meanwhile is told", calls: [FORCE_RECLAIM], memory: 4 * MIB);
    guests.force_reclaim_of_other_pages("claimed pages and those of others cannot be taken by force", calls: [FORCE_RECLAIM], memory: 4 * MIB);
    guests.reclaim_at_the_end("at the end private pages are zeroed and shared ones keep their contents", calls: [VM_RECLAIM], memory: 8 * MIB);
    guests.nothing_is_left_behind("what VM, vCPUs and tables were made of comes back zeroed", calls: [VM_DESTROY], memory: 4 * MIB);
    guests.share_of_an_absent_page("a page may be provided when the guest shares it", calls: [VM_MAP], memory: 4 * MIB);
    guests.ordinary_vm_borrows("an ordinary VM borrows its pages, and the host keeps access", calls: [VM_MAP, VM_UNMAP], memory: 16 * MIB);
    guests.registers_are_kept("at each exit guest and host keep every register, and the host sees none of the guest's", memory: 4 * MIB);
    guests.vectors_stay_apart("vCPUs that take turns on all CPUs start with zeroed vector registers and keep their own", memory: 8 * MIB);
    guests.vector_lengths("vectors of every length, of guests and of the host", memory: 8 * MIB);
    guests.id_registers("guests see what is allowed of the CPU's features", memory: 4 * MIB);
    guests.offered_features_work("what the ID registers offer works in a guest", memory: 4 * MIB);
    guests.closed_registers("debug, performance monitors, trace and hidden features are closed to guests", memory: 4 * MIB);
    guests.cycles_of_guests_are_not_counted("the host's cycle counter stands still while a guest runs", memory: 4 * MIB);
    guests.breakpoints_of_the_host("the host's breakpoints do not stop a guest", memory: 4 * MIB);
    guests.device_accesses_of_other_kinds("pairs, writeback, exclusives, atomics and vectors end in an abort in the guest", memory: 4 * MIB);
    guests.fetches_from_devices("no code is fetched from devices", memory: 4 * MIB);
    guests.page_faults("the host is told of an access without a page, and may provide one", calls: [VM_MAP], memory: 4 * MIB);
    guests.deadlines("WFI exits with the time of the next timer", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.timers("both timers fire again and again, for guests that sleep and guests that do not", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.timers_are_levels("the interrupt of a timer lasts as long as the timer says", memory: 4 * MIB);
    guests.sgis("SGIs to oneself, to others and to all of them, waiting or running", memory: 4 * MIB);
    guests.spis("edges, levels, priorities, masks, active state, messages and routes of SPIs", calls: [SPI], memory: 4 * MIB);
    guests.more_interrupts_than_list_registers("each of many interrupts comes once and by its priority, in either EOImode", calls: [SPI], memory: 4 * MIB);
    guests.spi_while_the_guest_runs("an SPI gets to a guest that runs", calls: [SPI], cpus: 2, memory: 4 * MIB);
    guests.interrupts_move_with_their_vcpu("timers and pending interrupts go with a vCPU from CPU to CPU", memory: 4 * MIB);
    guests.measurement("the measurement is that of contents, frames and order", calls: [VM_MAP, VM_SEAL], memory: 4 * MIB);
    guests.device_accesses("loads and stores of all widths, signs and registers exit to the host", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.device_accesses_by_sp("the same with SP as the base register", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.device_accesses_without_syndrome("accesses to devices that the CPU does not describe are an abort in the guest", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.answers_to_accesses("the host lets an access fail, or be tried again", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.nothing_leaks("exits show no register of the guest but the one that they are about", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.waiting("a guest that waits says until when", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.endless_loop_and_host_timer("the host's timer gets through to a guest that never stops", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.endless_loop_and_interrupt_of_another_cpu("so does an interrupt of another CPU", calls: [VCPU_RUN], cpus: 2, memory: 4 * MIB);
    guests.host_timer_is_kept("the host's virtual timer is as it was after a guest has run", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.host_registers_are_kept("so are its system registers", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.one_vcpu_on_two_cpus("a vCPU that runs is BUSY, and so is its VM for what would end it", calls: [VCPU_RUN, VM_TEARDOWN], cpus: 2, memory: 4 * MIB);
    guests.run_page_changes_all_the_time("the host changes the run page while the hypervisor reads it", calls: [VCPU_RUN], cpus: 2, memory: 4 * MIB);
    guests.run_page_stays("the run page cannot be taken from under the hypervisor", calls: [VCPU_CREATE], memory: 4 * MIB);
    guests.host_touches_what_it_gave("every access of the host to what is a VM's is aborted", calls: [VM_MAP], memory: 4 * MIB);
    guests.host_gives_twice("the host gives one page twice: to two VMs, two frames, the hypervisor", calls: [VM_MAP, DONATE, SHARE, VM_DONATE_TABLES, VCPU_CREATE, VM_CREATE], memory: 8 * MIB);
    guests.host_gives_what_is_no_memory("devices, holes and what is behind RAM cannot be given", calls: [VM_MAP, VM_DONATE_TABLES, VCPU_CREATE], memory: 4 * MIB);
    guests.host_maps_over("the host puts pages over private, shared and poisoned ones and the interrupt controller", calls: [VM_MAP], memory: 8 * MIB);
    guests.host_claims_and_releases_what_it_may_not("claims of what is not offered, releases of what is not claimed", calls: [CLAIM, RELEASE], memory: 8 * MIB);
    guests.host_speaks_for_the_guest("the host cannot make calls in the guest's place", memory: 4 * MIB);
    guests.guest_converts_what_it_may_not("a guest converts devices, nothing, foreign and overflowing ranges, and twice", memory: 4 * MIB);
    guests.guest_maintains_caches_and_tlbs("maintenance by set and way, of other address spaces and of EL2", memory: 8 * MIB);
    guests.guest_touches_what_is_not_its_own("a guest reaches for memory of others", memory: 4 * MIB);
    guests.ring_in_place("buffers that a guest's ring shares and takes back, with one exit and one invalidation for all", calls: [VCPU_RUN, CLAIM], memory: 8 * MIB);
    guests.ring_refused("the host keeps some of what a ring wants back", calls: [VCPU_RUN, CLAIM, RELEASE], memory: 4 * MIB);
    guests.quiet_shares("a host that does not want to be told of shares is not", calls: [VCPU_RUN, CLAIM], memory: 4 * MIB);
    guests.ring_of_nonsense("words without sense in a ring, numbers that cannot be, and pages that are no rings", calls: [VCPU_RUN, FORCE_RECLAIM, CLAIM], memory: 4 * MIB);
    guests.ring_of_a_vcpu_that_is_off("a vCPU that is turned on anew has no ring", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.rings_race("the host claims and releases while a ring shares and takes back", calls: [CLAIM, RELEASE], cpus: 2, memory: 4 * MIB);
    guests.conversions_race("the host claims and releases while the guest shares and takes back", calls: [CLAIM, RELEASE], cpus: 2, memory: 4 * MIB);
    guests.lives_race("CPUs end a VM and use it at once", calls: [VM_TEARDOWN], memory: 4 * MIB);
    guests.flood_of_spis("SPIs without end, and those that are not the host's", calls: [SPI], memory: 4 * MIB);
    guests.calls_keep_registers("a call keeps what it does not return, MRS what it does not name", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.psci_discovery("PSCI and SMCCC say what there is, and the rest is NOT_SUPPORTED", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.calls_with_immediates("HVC and SMC with an immediate are no calls", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.vcpus_on_and_off("vCPUs are turned on and off by their guest", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.vcpus_start_out_of_reset("a vCPU starts with nothing of another one's", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.suspend("CPU_SUSPEND waits for an interrupt", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.pkvm_discovery("pKVM's hypercalls, with their numbers and results", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.realm_services("the Realm Services Interface: version, configuration, states, measurements", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.realm_calls_its_host("a realm calls its host", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.entropy("random numbers differ, if there are any", calls: [VCPU_RUN], memory: 4 * MIB);
    guests.stale_after_force_reclaim("what is taken by force is gone for vCPUs that use it", calls: [FORCE_RECLAIM], cpus: 2, memory: 16 * MIB);
    guests.stale_after_relinquish("so is what another vCPU gives up", cpus: 2, memory: 16 * MIB);
    guests.stale_after_unmap("so is what the host takes back from an ordinary VM", calls: [VM_UNMAP], cpus: 2, memory: 16 * MIB);
    guests.stale_after_a_realm_converts("so is the address that a realm's page has left", cpus: 2, memory: 16 * MIB);
    guests.stale_after_the_host_gives_and_releases("so is what the host gives or releases for its CPUs that use it", calls: [VM_MAP, RELEASE], cpus: 2, memory: 16 * MIB);
    guests.vms_do_not_see_each_other("VMs have other memory at the same address, on one CPU and on several", calls: [VCPU_RUN], memory: 8 * MIB);
    guests.nothing_is_left_in_the_tlb("a VM in the place of one that is gone has none of its translations", calls: [VM_DESTROY], memory: 8 * MIB);
    guests.vcpus_on_all_cpus("vCPUs run at once, and go from CPU to CPU", calls: [VCPU_RUN, CLAIM, RELEASE], memory: 8 * MIB);
    guests.vcpus_have_their_own_translations("vCPUs with other tables under one ASID do not mix them up", calls: [VCPU_RUN], memory: 8 * MIB);
    guests.gigabyte("2^18 pages are shared, claimed, released and taken back in one call each", calls: [VM_MAP, CLAIM, RELEASE], memory: GIB);

    random.host_calls("random calls of all CPUs, well-formed and malformed, about the same pages; the totals agree", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN, PAGE_STATE, STATISTICS], memory: 8 * MIB);
    random.everything("the same with VMs that come and go, and guests of each kind that do things at random, too", calls: [SHARE, UNSHARE, DONATE, TAKE_BACK, PIN, UNPIN, PAGE_STATE, STATISTICS, VM_SIZES, REGISTER_RESET_VALUE, VCPU_GET_REGISTER, VCPU_SET_REGISTER, VM_CREATE, VM_DONATE_TABLES, VCPU_CREATE, VM_MAP, VM_UNMAP, VM_SEAL, VCPU_RUN, CLAIM, RELEASE, FORCE_RECLAIM, SPI, VM_TEARDOWN, VM_RECLAIM, VM_DESTROY], memory: 32 * MIB);

    bench.calls("every call succeeds on ranges of 1, 8 and 512 pages between the marks of the counter", memory: 8 * MIB);
    bench.guests("exits and conversions of guests between the marks of the counter", memory: 64 * MIB);
    bench.ranges("the same with ranges of 1 to 4096 pages", memory: 128 * MIB);
    bench.vms("the same with 1 to 255 VMs around", memory: 128 * MIB);
    bench.memory("pages of guests as blocks and one by one, and the translation tables that conversions take", memory: 64 * MIB);
    bench.contention("conversions on all CPUs at once, by the host and by guests of one VM and of several", memory: 32 * MIB);

}
