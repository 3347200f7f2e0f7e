//! Where the hypervisor, the host's image and its initrd go in RAM before the machine starts.
//!
//! QEMU does not complain when what it loads overlaps, so everything is placed here: off each other, off the device tree
//! that QEMU writes, off the first 2 MiB of RAM (where firmware-like hosts look for their device tree) and off the top
//! of RAM, where the hypervisor makes its carve-out.

use std::ops::Range;

use anyhow::{Result, ensure};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;

/// QEMU lets the device tree grow up to 1 MiB and aligns it to 2 MiB.
const DEVICE_TREE: u64 = BLOCK;

/// What has to be placed. Addresses and sizes are in bytes.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Start of RAM.
    pub(crate) ram_base: u64,
    /// Size of RAM.
    pub(crate) ram_size: u64,
    /// Memory of what QEMU's `-kernel` loads: the hypervisor, or a trampoline.
    pub(crate) loaded: u64,
    /// The host's image.
    pub(crate) host: Host,
    /// Size of the initrd.
    pub(crate) initrd: Option<u64>,
}

/// The host's image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    /// Memory that it takes.
    pub(crate) size: u64,
    /// Distance from a 2 MiB boundary.
    pub(crate) text_offset: u64,
    /// Where the user wants it.
    pub(crate) fixed: Option<u64>,
}

/// Where everything goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Distance of what `-kernel` loads from the start of RAM, a multiple of 2 MiB and not 0.
    pub(crate) text_offset: u64,
    /// Address of the host's image.
    pub(crate) host: u64,
    /// Address of the initrd.
    pub(crate) initrd: Option<u64>,
}

/// Memory that the hypervisor takes at most from the top of RAM: 2.25 MiB per GiB and 4 MiB.
pub(crate) fn carve_out(ram_size: u64) -> u64 {
    (ram_size / 1024 * 9 / 4 + 4 * MIB).next_multiple_of(BLOCK)
}

/// Finds a place for everything.
///
/// # Errors
///
/// RAM is too small, or the address that the user wants leaves no room.
pub(crate) fn place(request: &Request) -> Result<Layout> {
    let end = request.ram_base + request.ram_size;
    let usable = request.ram_base..end.saturating_sub(carve_out(request.ram_size));
    let mut taken = Vec::new();
    if let Some(address) = request.host.fixed {
        let host = address..address.saturating_add(request.host.size);
        ensure!(
            usable.start <= host.start && host.end <= usable.end,
            "the host's image at {:#x}..{:#x} does not lie in RAM below the carve-out, {:#x}..{:#x}",
            host.start,
            host.end,
            usable.start,
            usable.end
        );
        taken.push(host);
    }

    // The device tree follows what `-kernel` loads when that ends beyond 128 MiB; both have to miss a fixed image.
    let mut candidates = (usable.start + BLOCK..usable.end).step_by(BLOCK as usize).map(|start| {
        let loaded = start..start + request.loaded;
        let tree = device_tree(request, loaded.end);
        [loaded, tree]
    });
    let free = |range: &Range<u64>, taken: &[Range<u64>]| {
        range.end <= usable.end && !taken.iter().any(|other| range.start < other.end && other.start < range.end)
    };
    let loaded = candidates.find(|ranges| ranges.iter().all(|range| free(range, &taken)));
    let Some([loaded, tree]) = loaded else {
        anyhow::bail!("no room for the hypervisor and the device tree in {} MiB of RAM", request.ram_size / MIB);
    };
    let text_offset = loaded.start - request.ram_base;
    taken.extend([loaded, tree, usable.start..usable.start + BLOCK]);

    let mut allocate = |what: &str, size: u64, offset: u64| -> Result<u64> {
        let found = (usable.start..usable.end)
            .step_by(BLOCK as usize)
            .map(|start| start + offset..start + offset + size)
            .find(|range| free(range, &taken));
        let Some(range) = found else {
            anyhow::bail!("no room for the host's {what} of {size:#x} bytes in {} MiB of RAM", request.ram_size / MIB);
        };
        taken.push(range.clone());
        Ok(range.start)
    };
    let host = match request.host.fixed {
        Some(address) => address,
        None => allocate("image", request.host.size, request.host.text_offset)?,
    };
    let initrd = request.initrd.map(|size| allocate("initrd", size, 0)).transpose()?;
    Ok(Layout { text_offset, host, initrd })
}

/// Where QEMU 10.0 puts the device tree (hw/arm/boot.c): at 128 MiB or half of a smaller RAM, but behind the kernel.
fn device_tree(request: &Request, kernel_end: u64) -> Range<u64> {
    let start = (request.ram_base + (request.ram_size / 2).min(128 * MIB)).max(kernel_end).next_multiple_of(BLOCK);
    start..start + DEVICE_TREE
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x4000_0000;

    fn request(ram_mib: u64, host: Host) -> Request {
        Request { ram_base: BASE, ram_size: ram_mib * MIB, loaded: 3 * MIB, host, initrd: Some(2 * MIB) }
    }

    fn linux() -> Host {
        Host { size: 52 * MIB, text_offset: 0, fixed: None }
    }

    /// Everything that the layout puts into RAM.
    fn ranges(request: &Request, layout: &Layout) -> Vec<Range<u64>> {
        let loaded = BASE + layout.text_offset..BASE + layout.text_offset + request.loaded;
        let mut all = vec![device_tree(request, loaded.end), loaded, layout.host..layout.host + request.host.size];
        all.extend(layout.initrd.zip(request.initrd).map(|(start, size)| start..start + size));
        all
    }

    fn check(request: &Request) -> Layout {
        let layout = place(request).unwrap();
        let all = ranges(request, &layout);
        let end = BASE + request.ram_size - carve_out(request.ram_size);
        for (index, one) in all.iter().enumerate() {
            assert!(one.start >= BASE && one.end <= end, "{one:x?} in {layout:x?}");
            for other in &all[index + 1..] {
                assert!(one.end <= other.start || other.end <= one.start, "{one:x?} {other:x?} in {layout:x?}");
            }
        }
        layout
    }

    #[test]
    fn linux_in_every_size() {
        for ram in [256, 512, 1024, 2048, 4096, 8192] {
            let layout = check(&request(ram, linux()));
            assert_eq!(layout.text_offset, BLOCK);
            assert!(layout.host >= BASE + BLOCK && layout.host.is_multiple_of(BLOCK));
        }
    }

    #[test]
    fn large_images_go_behind_the_device_tree() {
        let layout = check(&request(512, Host { size: 150 * MIB, text_offset: 0, fixed: None }));
        assert!(layout.host >= BASE + 130 * MIB);
    }

    #[test]
    fn a_text_offset_is_kept() {
        let layout = check(&request(512, Host { size: 8 * MIB, text_offset: 0x8_0000, fixed: None }));
        assert_eq!(layout.host % BLOCK, 0x8_0000);
    }

    #[test]
    fn the_hypervisor_makes_way_for_a_fixed_image() {
        let fixed = |address| Host { size: MIB, text_offset: 0, fixed: Some(address) };
        assert_eq!(check(&request(512, fixed(BASE + 0x8_0000))).text_offset, BLOCK);
        assert_eq!(check(&request(512, fixed(BASE + 3 * MIB))).text_offset, 4 * MIB);
        assert_eq!(check(&request(512, fixed(0x6000_0000 - 32 * MIB))).text_offset, BLOCK);
        // On the device tree's usual place: the hypervisor goes behind it and the tree follows.
        let layout = check(&request(512, fixed(BASE + 128 * MIB)));
        assert!(layout.text_offset >= 126 * MIB);
    }

    #[test]
    fn impossible_places_are_refused() {
        let fixed = |address| Host { size: 8 * MIB, text_offset: 0, fixed: Some(address) };
        assert!(place(&request(512, fixed(0x1000))).is_err());
        assert!(place(&request(512, fixed(BASE + 511 * MIB))).is_err());
        assert!(place(&request(512, fixed(u64::MAX - 4))).is_err());
        assert!(place(&request(64, linux())).is_err());
    }

    #[test]
    fn carve_out_grows_with_ram() {
        assert_eq!(carve_out(512 * MIB), 6 * MIB);
        assert_eq!(carve_out(8192 * MIB), 22 * MIB);
    }
}
