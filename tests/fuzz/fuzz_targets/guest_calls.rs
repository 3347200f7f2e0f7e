//! See `ravelin_fuzz::guest_calls`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ravelin_fuzz::guest_calls(data));
