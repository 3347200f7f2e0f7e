//! See `ravelin_fuzz::dtb`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ravelin_fuzz::dtb(data));
