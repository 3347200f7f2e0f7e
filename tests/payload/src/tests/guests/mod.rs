//! Guests: the payload is their host.

mod attacks;
mod calls;
pub(crate) mod convert;
mod exits;
mod faults;
mod features;
mod interrupts;
mod life;
mod registers;
mod ring;
mod stale;
mod world;
mod worlds;

pub(crate) use attacks::{
    conversions_race, flood_of_spis, guest_converts_what_it_may_not, guest_maintains_caches_and_tlbs,
    guest_touches_what_is_not_its_own, host_claims_and_releases_what_it_may_not, host_gives_twice,
    host_gives_what_is_no_memory, host_maps_over, host_speaks_for_the_guest, host_touches_what_it_gave, lives_race,
};
pub(crate) use calls::{
    calls_keep_registers, calls_with_immediates, entropy, pkvm_discovery, psci_discovery, realm_calls_its_host,
    realm_services, suspend, vcpus_on_and_off, vcpus_start_out_of_reset,
};
pub(crate) use convert::{
    answers_that_do_not_belong, bounded_work, conversion_in_place, conversion_of_blocks,
    force_reclaim_of_offered_pages, force_reclaim_of_other_pages, force_reclaim_poisons,
    force_reclaim_while_the_guest_unshares, invalidations, nothing_is_left_behind, ordinary_vm_borrows, populate,
    reclaim_at_the_end, refused_unshare, relinquish, relinquish_again_and_again, relinquish_of_poison,
    share_of_an_absent_page, unshare_of_claimed_pages,
};
pub(crate) use exits::{
    answers_to_accesses, device_accesses, device_accesses_by_sp, device_accesses_without_syndrome,
    endless_loop_and_host_timer, endless_loop_and_interrupt_of_another_cpu, host_registers_are_kept,
    host_timer_is_kept, nothing_leaks, one_vcpu_on_two_cpus, run_page_changes_all_the_time, run_page_stays, waiting,
};
pub(crate) use faults::{deadlines, device_accesses_of_other_kinds, fetches_from_devices, page_faults};
pub(crate) use features::{
    breakpoints_of_the_host, closed_registers, cycles_of_guests_are_not_counted, id_registers, offered_features_work,
};
pub(crate) use interrupts::{
    interrupts_move_with_their_vcpu, more_interrupts_than_list_registers, sgis, spi_while_the_guest_runs, spis, timers,
    timers_are_levels,
};
pub(crate) use life::{
    all_slots, all_vcpus, bad_arguments, ends_for_all_vcpus, ends_for_vcpus_that_run, handles, life_cycle, measurement,
    runs_to_its_end, steps_out_of_order, ten_thousand_lives, vcpus_that_are_not_made,
};
pub(crate) use registers::{
    counter_of_a_guest, registers_before_the_seal, registers_by_number, registers_of_protected_vms,
    registers_that_are_fixed, registers_without_a_vm,
};
pub(crate) use ring::{
    quiet_shares, ring_in_place, ring_of_a_vcpu_that_is_off, ring_of_nonsense, ring_refused, rings_race,
};
pub(crate) use stale::{
    stale_after_a_realm_converts, stale_after_force_reclaim, stale_after_relinquish,
    stale_after_the_host_gives_and_releases, stale_after_unmap,
};
pub(crate) use world::{registers_are_kept, vector_lengths, vectors_stay_apart};
pub(crate) use worlds::{
    gigabyte, nothing_is_left_in_the_tlb, vcpus_have_their_own_translations, vcpus_on_all_cpus,
    vms_do_not_see_each_other,
};
