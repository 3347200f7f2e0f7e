//! Tests on the build machine, with a simulated CPU interface.

mod chaos;
mod cpu;
mod delivery;
mod random;
mod reference;
mod registers;
mod world;
