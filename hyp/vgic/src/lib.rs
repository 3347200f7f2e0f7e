//! The GICv3 that a guest sees: distributor, redistributors and list-register scheduling.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), no_std)]
