//! See `ravelin_fuzz::vgic`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ravelin_fuzz::vgic(data));
