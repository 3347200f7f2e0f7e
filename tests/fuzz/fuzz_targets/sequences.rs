//! See `ravelin_fuzz::sequences`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ravelin_fuzz::sequences(data));
