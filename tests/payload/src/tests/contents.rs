//! What a transition does to the contents of pages: kept, except that what is taken back comes zeroed.

use crate::{
    rt::{
        console::{print, println, read_byte},
        memory::{self, BLOCK, PAGE},
        platform::platform,
    },
    tests::{Failure, Op, Outcome, arena, check, on_each_cpu, take_back},
};

fn fill(address: u64, pages: u64, seed: u64) {
    (0..pages).for_each(|index| memory::fill(address + index * PAGE, seed));
}

fn has_pattern(address: u64, pages: u64, seed: u64) -> Outcome {
    for page in (0..pages).map(|index| address + index * PAGE) {
        if let Some((address, value)) = memory::find_difference(page, seed) {
            return Err(Failure::new(format_args!("{address:#x} has become {value:#x}")));
        }
    }
    Ok(())
}

fn is_zero(address: u64, pages: u64) -> Outcome {
    for page in (0..pages).map(|index| address + index * PAGE) {
        if let Some((address, value)) = memory::find_nonzero(page) {
            return Err(Failure::new(format_args!("{address:#x} holds {value:#x}, not zero")));
        }
    }
    Ok(())
}

/// One page, some over a block boundary, a block.
fn ranges() -> [(u64, u64); 3] {
    let base = arena(4 * BLOCK);
    [(base + 9 * PAGE, 1), (base + BLOCK - 3 * PAGE, 8), (base + 2 * BLOCK, 512)]
}

pub(crate) fn kept_when_shared() -> Outcome {
    on_each_cpu(|cpu| {
        let seed = 10 + cpu as u64;
        for (address, pages) in ranges() {
            fill(address - PAGE, pages + 2, seed);
            Op::Share.succeeds(address, pages)?;
            has_pattern(address - PAGE, pages + 2, seed)?;
            Op::Pin.succeeds(address, pages)?;
            has_pattern(address - PAGE, pages + 2, seed)?;
            // The host still owns what it lends: it may write.
            fill(address, pages, seed + 1);
            Op::Unpin.succeeds(address, pages)?;
            has_pattern(address, pages, seed + 1)?;
            Op::Unshare.succeeds(address, pages)?;
            has_pattern(address, pages, seed + 1)?;
        }
        Ok(())
    })
}

pub(crate) fn zero_when_taken_back() -> Outcome {
    on_each_cpu(|cpu| {
        let seed = 20 + cpu as u64;
        for (address, pages) in ranges() {
            fill(address - PAGE, pages + 2, seed);
            Op::Donate.succeeds(address, pages)?;
            has_pattern(address - PAGE, 1, seed)?;
            has_pattern(address + pages * PAGE, 1, seed)?;
            take_back(address, pages)?;
            is_zero(address, pages)?;
            has_pattern(address - PAGE, 1, seed)?;
            has_pattern(address + pages * PAGE, 1, seed)?;
            fill(address, pages, seed + 1);
            has_pattern(address, pages, seed + 1)?;
        }
        Ok(())
    })
}

/// The host cannot see what it donated, so somebody who sees physical memory has to look: whoever runs the payload answers
/// `y` if the words are there, `n` if not.
pub(crate) fn kept_when_donated() -> Outcome {
    check!(platform().argument("inspector") == Some("yes"), "needs inspector=yes and someone who answers");
    const SEED: u64 = 30;
    for (address, pages) in ranges() {
        fill(address, pages, SEED);
        Op::Donate.succeeds(address, pages)?;
        for page in [address, address + (pages - 1) * PAGE] {
            println!();
            println!("inspect {page:#x} {SEED}");
            let answer = read_byte();
            print!("test contents.kept_when_donated ... ");
            check!(answer == b'y', "the donated page {page:#x} lost its contents");
        }
        take_back(address, pages)?;
    }
    Ok(())
}
