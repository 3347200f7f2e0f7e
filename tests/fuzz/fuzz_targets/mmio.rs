//! See `ravelin_fuzz::mmio`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ravelin_fuzz::mmio(data));
