//! The device tree from end to end: QEMU's own, edited ones, broken ones and random ones.

mod broken;
mod good;
mod host_dtb;
mod layout;
mod random;
mod tree;
