//! Tests on the build machine.
