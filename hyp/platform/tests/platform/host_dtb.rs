//! The device tree that the host gets.

use dtoolkit::{
    Node, Property,
    fdt::{Fdt, FdtNode},
};
use ravelin_memory::PhysRange;
use ravelin_platform::{Platform, SLACK};

use crate::tree::{GIC_V3, KERNEL, RAM_BASE, RAMDISK, Tree, reg};

const TOP: u64 = RAM_BASE + (2 << 30);

fn carve_out(base: u64, end: u64) -> PhysRange {
    PhysRange::from_bounds(base, end).unwrap()
}

fn write(dtb: &[u8], carve_out: PhysRange) -> Vec<u8> {
    let mut out = vec![0xa5; 2 << 20];
    let size = Platform::parse(dtb).unwrap().write_host_dtb(carve_out, &mut out).unwrap();
    assert!(out[size..].iter().all(|byte| *byte == 0xa5), "nothing is written behind the end");
    out.truncate(size);
    out
}

fn cells(node: FdtNode<'_>, name: &str) -> Vec<u32> {
    let value = node.property(name).unwrap_or_else(|| panic!("no {name}"));
    value.value().as_chunks().0.iter().map(|cell| u32::from_be_bytes(*cell)).collect()
}

/// Everything in the tree, with a path in front, one line for each node and property.
fn listing(dtb: &[u8]) -> Vec<String> {
    fn list(node: FdtNode<'_>, path: &str, lines: &mut Vec<String>) {
        lines.push(path.to_owned());
        lines.extend(node.properties().map(|property| format!("{path}:{}={:x?}", property.name(), property.value())));
        node.children().for_each(|child| list(child, &format!("{path}/{}", child.name()), lines));
    }
    let mut lines = Vec::new();
    list(Fdt::new(dtb).unwrap().root(), "", &mut lines);
    lines
}

#[test]
fn only_the_edits_differ() {
    let out = write(GIC_V3, carve_out(TOP - (6 << 20), TOP));
    let (before, after) = (listing(GIC_V3), listing(&out));
    let gone: Vec<_> = before.iter().filter(|line| !after.contains(line)).cloned().collect();
    let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).cloned().collect();
    let modules = gone.iter().filter(|line| line.starts_with(KERNEL) || line.starts_with(RAMDISK)).count();
    assert_eq!(modules, 7, "two nodes with their properties");
    let rest: Vec<_> = gone.iter().filter(|line| !line.contains("/module@")).map(|line| &line[..20]).collect();
    assert_eq!(rest, ["/memory@40000000:reg", "/chosen:bootargs=[6c"]);
    let names: Vec<_> = new.iter().map(|line| line.split('=').next().unwrap()).collect();
    assert_eq!(
        names,
        [
            "/memory@40000000:reg",
            "/chosen:bootargs",
            "/chosen:linux,initrd-start",
            "/chosen:linux,initrd-end",
            "/reserved-memory",
            "/reserved-memory:#address-cells",
            "/reserved-memory:#size-cells",
            "/reserved-memory:ranges",
            "/reserved-memory/ravelin@bfa00000",
            "/reserved-memory/ravelin@bfa00000:reg",
            "/reserved-memory/ravelin@bfa00000:no-map",
        ]
    );
    // What is left is in the order that it was in.
    let kept = |lines: &[String], other: &[String]| -> Vec<String> {
        lines.iter().filter(|line| other.contains(line)).cloned().collect()
    };
    assert_eq!(kept(&before, &after), kept(&after, &before));
}

#[test]
fn what_is_new_is_right() {
    let out = write(GIC_V3, carve_out(TOP - (6 << 20), TOP));
    let fdt = Fdt::new(&out).unwrap();
    let chosen = fdt.find_node("/chosen").unwrap();
    assert_eq!(chosen.property("bootargs").unwrap().value(), b"console=ttyAMA0 quiet\0");
    assert_eq!(cells(chosen, "linux,initrd-start"), [0, 0x5800_0000]);
    assert_eq!(cells(chosen, "linux,initrd-end"), [0, 0x5801_86a0]);
    assert_eq!(cells(fdt.find_node("/memory").unwrap(), "reg"), reg(RAM_BASE, (2 << 30) - (6 << 20)));
    let reserved = fdt.find_node("/reserved-memory").unwrap();
    assert_eq!((cells(reserved, "#address-cells"), cells(reserved, "#size-cells")), (vec![2], vec![2]));
    assert_eq!(reserved.property("ranges").unwrap().value(), b"");
    let ours = reserved.child("ravelin").unwrap();
    assert_eq!(cells(ours, "reg"), reg(TOP - (6 << 20), 6 << 20));
    assert_eq!(ours.property("no-map").unwrap().value(), b"");
}

#[test]
fn there_is_room_for_firmware_to_edit_in_place() {
    let out = write(GIC_V3, carve_out(TOP - (6 << 20), TOP));
    let field = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!(field(4), out.len());
    let end = field(12) + field(32);
    assert!(out.len() - end >= SLACK);
    assert!(out[end..].iter().all(|byte| *byte == 0));
    assert_eq!((field(20), field(24), field(28)), (17, 16, 0));
    assert_eq!(field(8) + field(36), field(12));
}

#[test]
fn a_carve_out_in_the_middle_cuts_memory_in_two() {
    let out = write(GIC_V3, carve_out(0x6000_0000, 0x6060_0000));
    let memory = Fdt::new(&out).unwrap().find_node("/memory").unwrap();
    let pieces = [reg(RAM_BASE, 0x2000_0000), reg(0x6060_0000, TOP - 0x6060_0000)].concat();
    assert_eq!(cells(memory, "reg"), pieces);
}

#[test]
fn a_carve_out_may_reach_into_several_nodes() {
    let dtb =
        Tree::virt().ram(&[(0x4000_0000, 0x4000_0000), (0x8000_0000, 0x20_0000), (0x8020_0000, 0x1000_0000)]).dtb();
    let out = write(&dtb, carve_out(0x7fe0_0000, 0x8040_0000));
    let fdt = Fdt::new(&out).unwrap();
    assert_eq!(cells(fdt.find_node("/memory@40000000").unwrap(), "reg"), reg(0x4000_0000, 0x3fe0_0000));
    assert!(fdt.find_node("/memory@80000000").is_none());
    assert_eq!(cells(fdt.find_node("/memory@80200000").unwrap(), "reg"), reg(0x8040_0000, 0xfe0_0000));
}

#[test]
fn an_existing_reserved_memory_is_extended() {
    let mut tree = Tree::virt()
        .add("/", "reserved-memory")
        .set("/reserved-memory", "#address-cells", 2_u32)
        .set("/reserved-memory", "#size-cells", 2_u32)
        .add("/reserved-memory", "tee@70000000")
        .set("/reserved-memory/tee@70000000", "reg", reg(0x7000_0000, 0x1000));
    tree.0.memory_reservations.push(dtoolkit::memreserve::MemoryReservation::new(0x4100_0000, 0x10));
    let out = write(&tree.dtb(), carve_out(0x6000_0000, 0x6060_0000));
    let fdt = Fdt::new(&out).unwrap();
    assert_eq!(
        fdt.memory_reservations().map(|entry| (entry.address(), entry.size())).collect::<Vec<_>>(),
        [(0x4100_0000, 0x10)]
    );
    let reserved = fdt.find_node("/reserved-memory").unwrap();
    let names: Vec<_> = reserved.children().map(|child| child.name()).collect();
    assert_eq!(names, ["tee@70000000", "ravelin@60000000"]);
    assert_eq!(reserved.property("ranges").unwrap().value(), b"", "without it Linux takes nothing of it");
    assert_eq!(fdt.root().children().filter(|child| child.name() == "reserved-memory").count(), 1);
}

#[test]
fn a_host_without_command_line_and_ramdisk() {
    let dtb = Tree::virt().unset(KERNEL, "bootargs").remove("/chosen", &RAMDISK[8..]).dtb();
    let out = write(&dtb, carve_out(0x6000_0000, 0x6060_0000));
    let chosen = Fdt::new(&out).unwrap().find_node("/chosen").unwrap();
    let names: Vec<_> = chosen.properties().map(|property| property.name().to_owned()).collect();
    assert_eq!(names, ["stdout-path", "rng-seed", "kaslr-seed"]);
    assert_eq!(chosen.children().count(), 0);
}

#[test]
fn a_ramdisk_for_linux_stays() {
    let dtb = Tree::virt()
        .remove("/chosen", &RAMDISK[8..])
        .set("/chosen", "linux,initrd-start", 0x6000_0010_u32)
        .set("/chosen", "linux,initrd-end", 0x6000_0020_u32)
        .dtb();
    let out = write(&dtb, carve_out(0x7000_0000, 0x7060_0000));
    let chosen = Fdt::new(&out).unwrap().find_node("/chosen").unwrap();
    assert_eq!(cells(chosen, "linux,initrd-start"), [0, 0x6000_0010]);
    assert_eq!(cells(chosen, "linux,initrd-end"), [0, 0x6000_0020]);
    assert_eq!(chosen.properties().filter(|property| property.name() == "linux,initrd-end").count(), 1);
}

#[test]
fn padding_tokens_are_left_out() {
    let mut edited = GIC_V3.to_vec();
    let mut fdt = dtoolkit::fdt_mut::FdtMut::from_slice(&mut edited).unwrap();
    assert!(fdt.root_mut().remove_child("pcie@10000000"));
    let out = write(&edited, carve_out(0x6000_0000, 0x6060_0000));
    let direct = write(&Tree::virt().remove("/", "pcie@10000000").dtb(), carve_out(0x6000_0000, 0x6060_0000));
    assert_eq!(listing(&out), listing(&direct));
}
