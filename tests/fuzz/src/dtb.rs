//! Device trees: the platform that is read from them, where things are put, and the host's device tree.

mod input;

use arbitrary::{Arbitrary, Unstructured};
use dtoolkit::{
    Node, Property,
    fdt::{Fdt, FdtNode},
};
use ravelin_memory::{BLOCK_SIZE, PAGE_SIZE, PhysRange};
use ravelin_platform::{CPU_BLOCK_SIZE, Demand, HostImage, Layout, MAX_HOST_DTB_SIZE, Platform, SLACK, find_console};

use input::Input;

/// Reads a device tree, plans, and writes the host's; checks that what is ours is in RAM and in nothing else, and that the
/// host's device tree is the same but for the edits that it must have.
pub fn dtb(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let dtb = input.dtb();
    let console = find_console(&dtb);
    let platform = match Platform::parse(&dtb) {
        Ok(platform) => platform,
        Err(error) => {
            assert!(error.to_string().starts_with('/'), "{error}");
            return;
        }
    };
    assert_eq!(console, Some(platform.uart));
    check_platform(&platform);
    let Ok(host) = HostImage::inspect(&platform, &input.header()) else { return };
    assert!(host.footprint.covers(&pages(host.entry.raw(), 1)));
    assert!(host.footprint.covers(&platform.kernel.bytes.pages()));
    let demand = input.demand();
    let Ok(layout) = Layout::plan(&platform, &host, &demand) else { return };
    check_layout(&platform, &layout, &demand, host.footprint);
    check_host_dtb(&dtb, &platform, &layout);
}

/// The pages of `size` bytes at `base`.
fn pages(base: u64, size: u64) -> PhysRange {
    PhysRange::from_bounds(base & !(PAGE_SIZE - 1), (base + size).next_multiple_of(PAGE_SIZE)).unwrap()
}

fn check_platform(platform: &Platform<'_>) {
    let ram = &platform.ram;
    assert!(!ram.is_empty() && ram.windows(2).all(|pair| pair[0].end() < pair[1].base().raw()), "{ram:?}");
    let gic = &platform.gic;
    for device in [platform.uart, gic.distributor].iter().chain(&gic.redistributors) {
        assert!(!ram.iter().any(|region| region.overlaps(device)), "{device} is RAM");
    }
    let mut cpus: Vec<_> = platform.cpus().collect();
    assert_eq!(cpus.len(), platform.cpu_count());
    cpus.sort_unstable();
    assert!(cpus.windows(2).all(|pair| pair[0] != pair[1]));
    let redistributors: u64 = gic.redistributors.iter().map(|region| region.size() / (128 << 10)).sum();
    assert!(redistributors >= cpus.len() as u64);
    let kernel = platform.kernel.bytes.pages();
    assert!(ram.iter().any(|region| region.covers(&kernel)));
    if let Some(ramdisk) = platform.ramdisk.as_ref().map(|ramdisk| ramdisk.bytes.pages()) {
        assert!(ram.iter().any(|region| region.covers(&ramdisk)) && !ramdisk.overlaps(&kernel));
    }
}

fn check_layout(platform: &Platform<'_>, layout: &Layout, demand: &Demand, footprint: PhysRange) {
    let carve_out = layout.carve_out;
    assert_eq!((carve_out.base().raw() % BLOCK_SIZE, carve_out.size() % BLOCK_SIZE), (0, 0));
    let parts = [layout.page_entries, layout.block_entries, layout.image, layout.cpus, layout.pool];
    assert_eq!((parts[0].base(), parts[4].end()), (carve_out.base(), carve_out.end()));
    assert!(parts.windows(2).all(|pair| pair[0].end() == pair[1].base().raw()));
    let blocks: u64 =
        platform.ram.iter().map(|region| region.end().div_ceil(BLOCK_SIZE) - region.base().raw() / BLOCK_SIZE).sum();
    assert_eq!(layout.page_entries.pages(), blocks);
    assert!(layout.block_entries.size() >= blocks * 8 && layout.image.size() >= demand.image_size);
    assert_eq!(layout.cpus.size(), CPU_BLOCK_SIZE * platform.cpu_count() as u64);
    assert!(layout.host_dtb.base().is_aligned(BLOCK_SIZE) && layout.host_dtb.size() <= MAX_HOST_DTB_SIZE as u64);
    assert!(!layout.host_dtb.overlaps(&carve_out));
    for ours in [carve_out, layout.host_dtb] {
        assert!(platform.ram.iter().any(|region| region.covers(&ours)), "{ours} is not RAM");
        let ramdisk = platform.ramdisk.as_ref().map(|ramdisk| ramdisk.bytes.pages());
        let taken = [footprint, demand.running, demand.dtb].into_iter().chain(ramdisk);
        for other in taken.chain(platform.reserved.iter().copied()) {
            assert!(!ours.overlaps(&other), "{ours} overlaps {other}");
        }
    }
}

fn check_host_dtb(dtb: &[u8], platform: &Platform<'_>, layout: &Layout) {
    // The room that was planned is enough.
    let mut out = vec![0xa5; layout.host_dtb.size() as usize];
    let Ok(size) = platform.write_host_dtb(layout.carve_out, &mut out) else {
        assert!(dtb.len() + SLACK + (4 << 10) > MAX_HOST_DTB_SIZE, "there is room for the host's device tree");
        return;
    };
    assert!(out[size..].iter().all(|&byte| byte == 0xa5), "nothing is written behind the end");
    let (before, after) = (Fdt::new(dtb).unwrap(), Fdt::new(&out[..size]).unwrap());
    assert_eq!(find_console(&out[..size]), Some(platform.uart));

    let memory: Vec<_> = memory(after.root()).flat_map(regions).collect();
    assert!(memory.iter().all(|region| !region.overlaps(&layout.carve_out)), "{memory:?}");
    assert_eq!(memory.iter().map(PhysRange::size).sum::<u64>(), platform.ram_size() - layout.carve_out.size());

    let reserved = child(after.root(), "reserved-memory").expect("the carve-out is reserved");
    let name = format!("ravelin@{:x}", layout.carve_out.base().raw());
    let ours = reserved.children().filter(|node| node.name() == name).last().expect("by a node of its own");
    assert_eq!(regions(ours), [layout.carve_out]);
    assert!(value(ours, "no-map").is_some() && value(reserved, "ranges").is_some());

    let chosen = child(after.root(), "chosen").expect("there was one");
    assert!(!chosen.children().any(is_module));
    let bootargs = value(chosen, "bootargs").unwrap_or_default();
    assert_eq!(bootargs.strip_suffix(b"\0").unwrap_or_default(), platform.kernel.bootargs.as_bytes());
    let number = |name| value(chosen, name).map(|value| u64::from_be_bytes(value.try_into().unwrap()));
    let ramdisk = platform.ramdisk.as_ref().map(|ramdisk| ramdisk.bytes);
    assert_eq!(number("linux,initrd-start"), ramdisk.map(|bytes| bytes.base()));
    assert_eq!(number("linux,initrd-end"), ramdisk.map(|bytes| bytes.end()));

    let reservations =
        |fdt: &Fdt<'_>| fdt.memory_reservations().map(|it| (it.address(), it.size())).collect::<Vec<_>>();
    assert_eq!(reservations(&before), reservations(&after));
    assert_eq!(unedited(before, layout.carve_out), unedited(after, layout.carve_out));
}

fn child<'a>(node: FdtNode<'a>, name: &str) -> Option<FdtNode<'a>> {
    node.children().find(|child| child.name() == name)
}

fn value<'a>(node: FdtNode<'a>, name: &str) -> Option<&'a [u8]> {
    node.property(name)?.value_as().ok()
}

fn memory(root: FdtNode<'_>) -> impl Iterator<Item = FdtNode<'_>> {
    root.children().filter(|node| is_memory(*node))
}

fn is_memory(node: FdtNode<'_>) -> bool {
    value(node, "device_type") == Some(b"memory\0") && matches!(value(node, "status"), None | Some(b"okay\0" | b"ok\0"))
}

fn is_module(node: FdtNode<'_>) -> bool {
    value(node, "compatible").unwrap_or_default().split(|&byte| byte == 0).any(|name| name == b"multiboot,module")
}

/// The ranges in `reg` of a child of the root, or of a node that counts in the root's cells.
fn regions(node: FdtNode<'_>) -> Vec<PhysRange> {
    let reg = node.reg().unwrap().into_iter().flatten();
    reg.map(|region| {
        let (base, size) = (region.address::<u64>().unwrap(), region.size::<u64>().unwrap());
        PhysRange::from_bounds(base, base + size).unwrap()
    })
    .collect()
}

/// All that the edits leave alone, a line for each node and property.
fn unedited(fdt: Fdt<'_>, carve_out: PhysRange) -> Vec<String> {
    let mut lines = Vec::new();
    list(&mut lines, "", fdt.root(), &|_| true);
    let (mut chosen, mut reserved) = (false, false);
    for node in fdt.root().children() {
        let path = format!("/{}", node.name());
        if node.name() == "chosen" && !chosen {
            chosen = true;
            let stays = |name: &str| !matches!(name, "bootargs" | "linux,initrd-start" | "linux,initrd-end");
            list(&mut lines, &path, node, &stays);
            node.children().filter(|node| !is_module(*node)).for_each(|node| list_all(&mut lines, &path, node));
        } else if node.name() == "reserved-memory" && !reserved {
            reserved = true;
            // What the root has of it anyway may have been added with the node.
            list(&mut lines, &path, node, &|name| !matches!(name, "ranges" | "#address-cells" | "#size-cells"));
            let ours = format!("ravelin@{:x}", carve_out.base().raw());
            node.children().filter(|node| node.name() != ours).for_each(|node| list_all(&mut lines, &path, node));
        } else if is_memory(node) {
            // A node that the carve-out takes all of goes.
            if regions(node).iter().any(|region| !carve_out.covers(region)) {
                list(&mut lines, &path, node, &|name| name != "reg");
                node.children().for_each(|child| list_all(&mut lines, &path, child));
            }
        } else {
            list_all(&mut lines, "", node);
        }
    }
    if !reserved {
        lines.push("/reserved-memory".into());
    }
    lines
}

fn list_all(lines: &mut Vec<String>, parent: &str, node: FdtNode<'_>) {
    let path = format!("{parent}/{}", node.name());
    list(lines, &path, node, &|_| true);
    node.children().for_each(|child| list_all(lines, &path, child));
}

/// Lists a node and its properties.
fn list(lines: &mut Vec<String>, path: &str, node: FdtNode<'_>, keep: &dyn Fn(&str) -> bool) {
    lines.push(path.to_owned());
    let kept = node.properties().filter(|property| keep(property.name()));
    lines.extend(kept.map(|property| format!("{path}:{}={:x?}", property.name(), property.value())));
}
