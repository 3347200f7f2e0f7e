//! Guests: the payload is their host.

mod convert;
mod life;

pub(crate) use convert::{
    answers_that_do_not_belong, bounded_work, conversion_in_place, conversion_of_blocks, force_reclaim_of_other_pages,
    force_reclaim_poisons, invalidations, nothing_is_left_behind, ordinary_vm_borrows, populate, reclaim_at_the_end,
    refused_unshare, relinquish, share_of_an_absent_page, unshare_of_claimed_pages,
};
pub(crate) use life::{
    all_slots, all_vcpus, bad_arguments, handles, life_cycle, measurement, runs_to_its_end, steps_out_of_order,
    ten_thousand_lives,
};
