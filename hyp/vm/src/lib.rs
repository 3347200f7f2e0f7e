//! VMs and vCPUs: handles, life cycle, registers, and what of an exit the host may see.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), no_std)]
