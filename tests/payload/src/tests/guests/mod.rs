//! Guests: the payload is their host.

mod life;

pub(crate) use life::{
    all_slots, all_vcpus, bad_arguments, handles, life_cycle, measurement, runs_to_its_end, steps_out_of_order,
    ten_thousand_lives,
};
