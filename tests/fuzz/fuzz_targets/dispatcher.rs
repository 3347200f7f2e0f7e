//! See `ravelin_fuzz::dispatcher`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ravelin_fuzz::dispatcher(data));
