//! What fuzzing has found worth keeping, again.

use std::{fs, path::Path};

/// Runs a target on the files of its corpus, and on the first half of each, which is an input as good as any.
fn replay(name: &str, target: fn(&[u8])) {
    for input in inputs(name) {
        target(&input);
        target(&input[..input.len() / 2]);
    }
}

/// Runs a target that takes next to no time on the files of its corpus, and on all that differ from one in all bits of a byte.
fn replay_around(name: &str, target: fn(&[u8])) {
    for mut input in inputs(name) {
        target(&input);
        for at in 0..input.len() {
            input[at] ^= 0xff;
            target(&input);
            input[at] ^= 0xff;
        }
    }
}

fn inputs(name: &str) -> impl Iterator<Item = Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 20, "{name}: {} inputs", paths.len());
    paths.into_iter().map(|path| {
        // What a test that fails shows last.
        println!("{}", path.display());
        fs::read(path).unwrap()
    })
}

#[test]
fn dispatcher() {
    replay("dispatcher", ravelin_fuzz::dispatcher);
}

#[test]
fn dtb() {
    replay("dtb", ravelin_fuzz::dtb);
}

#[test]
fn guest_calls() {
    replay("guest_calls", ravelin_fuzz::guest_calls);
}

#[test]
fn mmio() {
    replay_around("mmio", ravelin_fuzz::mmio);
}

#[test]
fn sequences() {
    replay("sequences", ravelin_fuzz::sequences);
}

#[test]
fn vgic() {
    replay("vgic", ravelin_fuzz::vgic);
}
