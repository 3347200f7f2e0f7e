//! Device trees with one fault each: the message names the node and says what is wrong.

use ravelin_memory::PhysRange;
use ravelin_platform::{Demand, HostImage, Layout, MAX_DTB_SIZE, Platform, dtb_size};

use crate::tree::{GIC_V2, GIC_V3, KERNEL, RAMDISK, Tree, demand, host, image_header, reg};

const RAM: &str = "/memory@40000000";
const GIC: &str = "/intc@8000000";
const UART: &str = "/pl011@9000000";

fn message(dtb: &[u8]) -> String {
    Platform::parse(dtb).expect_err("the device tree is broken").to_string()
}

fn ram(base: u64, size: u64) -> Tree {
    Tree::virt().set(RAM, "reg", reg(base, size))
}

#[test]
fn no_device_tree() {
    assert!(message(&[]).starts_with("/: cannot be read"));
    assert!(message(&[0; 4096]).contains("magic"));
    assert!(message(&GIC_V3[..GIC_V3.len() - 1]).contains("cannot be read"));
}

#[test]
fn no_memory() {
    Tree::virt().remove("/", "memory@40000000").fails("/", "no node of device_type memory");
}

#[test]
fn memory_without_reg() {
    Tree::virt().unset(RAM, "reg").fails(RAM, "no property reg");
    Tree::virt().set(RAM, "reg", &[0_u32; 0][..]).fails(RAM, "no property reg");
}

/// The carve-out could be there, and the edits of these nodes do not cut it out.
#[test]
fn memory_that_is_another_node_too() {
    for name in ["chosen", "reserved-memory"] {
        let path = format!("/{name}");
        let tree = if name == "chosen" { Tree::virt() } else { Tree::virt().add("/", name) };
        let tree = tree.set(&path, "device_type", "memory").set(&path, "reg", reg(1 << 32, 1 << 30));
        tree.fails(&path, "malformed property device_type");
    }
}

#[test]
fn memory_with_half_a_region() {
    Tree::virt().cells(RAM, "reg", [0, 0x4000_0000, 0, 0x4000_0000, 1, 0]).fails(RAM, "malformed property reg");
}

#[test]
fn empty_memory() {
    ram(0x4000_0000, 0).fails(RAM, "0x0 bytes at 0x40000000: empty");
}

#[test]
fn misaligned_memory() {
    ram(0x4000_0800, 0x4000_0000).fails(RAM, "0x40000000 bytes at 0x40000800: not aligned");
    ram(0x4000_0000, 0x4000_0001).fails(RAM, "not aligned");
}

#[test]
fn memory_beyond_48_bits() {
    ram(0x4000_0000, 1 << 48).fails(RAM, "beyond 48-bit addresses");
    ram(1 << 48, 0x1000).fails(RAM, "beyond 48-bit addresses");
    ram(0x4000_0000, !0xfff).fails(RAM, "beyond 48-bit addresses");
}

#[test]
fn overlapping_memory() {
    Tree::virt()
        .ram(&[(0x4000_0000, 0x8000_0000), (0x6000_0000, 0x1000)])
        .fails("/memory@60000000", "0x60000000-0x60000fff overlaps other RAM at 0x40000000-0xbfffffff");
}

#[test]
fn too_many_regions() {
    let regions: Vec<_> = (0..33).map(|index| (0x4000_0000 + index * 0x1000_0000, 0x800_0000)).collect();
    Tree::virt().ram(&regions).fails("/memory@240000000", "more than 32 regions of RAM");
}

#[test]
fn absurd_cell_counts() {
    for (name, value) in [("#address-cells", 3_u32), ("#address-cells", 0), ("#size-cells", 0x4000_0001)] {
        Tree::virt().set("/", name, value).fails("/", name);
    }
    Tree::virt().set("/", "#address-cells", 2_u64).fails("/", "malformed property #address-cells");
}

#[test]
fn no_cpus() {
    Tree::virt().remove("/", "cpus").fails("/", "no node cpus");
    Tree::virt().cpus(0).fails("/cpus", "no CPU");
    Tree::virt().set("/cpus", "#address-cells", 3_u32).fails("/cpus", "malformed property #address-cells");
}

#[test]
fn two_cpus_with_one_affinity() {
    Tree::virt().set("/cpus/cpu@1", "reg", 0_u32).fails("/cpus/cpu@1", "affinity 0x0 is impossible or another CPU's");
}

#[test]
fn impossible_affinity() {
    Tree::virt().set("/cpus/cpu@1", "reg", 0x8000_0001_u32).fails("/cpus/cpu@1", "affinity 0x80000001");
}

#[test]
fn cpu_without_reg() {
    Tree::virt().unset("/cpus/cpu@1", "reg").fails("/cpus/cpu@1", "no property reg");
    Tree::virt().set("/cpus/cpu@1", "reg", "").fails("/cpus/cpu@1", "malformed property reg");
}

#[test]
fn cpu_enabled_by_something_else() {
    Tree::virt().set("/cpus/cpu@1", "enable-method", "spin-table").fails("/cpus/cpu@1", "other than PSCI");
}

#[test]
fn too_many_cpus() {
    Tree::virt().cpus(257).fails("/cpus/cpu@1000", "more than 256 CPUs");
}

#[test]
fn gic_v2() {
    let message = message(GIC_V2);
    assert_eq!(message, "/intc@8000000: this is a GICv2, and Ravelin needs a GICv3");
    Tree::virt().set(GIC, "compatible", "arm,gic-400").fails(GIC, "GICv2");
}

#[test]
fn no_gic() {
    Tree::virt().remove("/", "intc@8000000").fails("/", "no interrupt controller compatible with arm,gic-v3");
}

#[test]
fn gic_without_redistributors() {
    Tree::virt().set(GIC, "reg", reg(0x800_0000, 0x1_0000)).fails(GIC, "#redistributor-regions");
    Tree::virt().set(GIC, "#redistributor-regions", 2_u32).fails(GIC, "#redistributor-regions");
    Tree::virt().set(GIC, "#redistributor-regions", u32::MAX).fails(GIC, "more than 8 redistributor regions");
    Tree::virt().set(GIC, "#redistributor-regions", 0_u32).fails(GIC, "no redistributor for every CPU");
    Tree::virt().unset(GIC, "reg").fails(GIC, "no property reg");
}

#[test]
fn gic_with_fewer_redistributors_than_cpus() {
    let one = [0, 0x800_0000, 0, 0x1_0000, 0, 0x80a_0000, 0, 0x2_0000];
    Tree::virt().cells(GIC, "reg", one).fails(GIC, "no redistributor for every CPU");
}

#[test]
fn gic_that_overlaps_itself() {
    let same = [0, 0x800_0000, 0, 0x1_0000, 0, 0x800_0000, 0, 0xf6_0000];
    Tree::virt().cells(GIC, "reg", same).fails(GIC, "overlaps registers of the same GIC");
}

#[test]
fn devices_in_ram() {
    let gic = [0, 0x800_0000, 0, 0x1_0000, 0, 0x4000_0000, 0, 0xf6_0000];
    Tree::virt().cells(GIC, "reg", gic).fails(GIC, "0x40000000-0x40f5ffff overlaps RAM at 0x40000000-0xbfffffff");
    Tree::virt().set(UART, "reg", reg(0x4900_0000, 0x1000)).fails(UART, "overlaps RAM");
}

#[test]
fn no_uart() {
    Tree::virt().remove("/", "pl011@9000000").fails("/", "no node compatible with arm,pl011");
    Tree::virt().unset(UART, "reg").fails(UART, "no property reg");
    Tree::virt().set(UART, "reg", reg(0x900_0000, 0)).fails(UART, "empty");
    Tree::virt().set(UART, "reg", reg(!0xfff, 0x1000)).fails(UART, "beyond 48-bit addresses");
}

#[test]
fn no_psci() {
    Tree::virt().remove("/", "psci").fails("/", "no firmware compatible with arm,psci-1.0");
    Tree::virt().set("/psci", "compatible", "arm,psci").fails("/psci", "PSCI 0.1");
    Tree::virt().unset("/psci", "method").fails("/psci", "no property method");
    Tree::virt().set("/psci", "method", "spc").fails("/psci", "malformed property method");
}

#[test]
fn bad_options() {
    Tree::virt().set("/chosen", "bootargs", "loglevel=loud").fails("/chosen", "option loglevel");
    Tree::virt().set("/chosen", "bootargs", "exit=now").fails("/chosen", "option exit");
    Tree::virt().cells("/chosen", "bootargs", [0xffff_ffff_u32]).fails("/chosen", "malformed property bootargs");
}

#[test]
fn no_kernel() {
    Tree::virt().remove("/", "chosen").fails("/", "no node chosen");
    Tree::virt().remove("/chosen", &KERNEL[8..]).fails("/chosen", "no module compatible with multiboot,kernel");
}

#[test]
fn kernel_without_place() {
    Tree::virt().unset(KERNEL, "reg").fails(KERNEL, "no property reg");
    Tree::virt().cells(KERNEL, "reg", [0x5000_0000, 0x1000, 0]).fails(KERNEL, "malformed property reg");
    let two = [0, 0x5000_0000, 0, 0x1000, 0, 0x5100_0000, 0, 0x1000];
    Tree::virt().cells(KERNEL, "reg", two).fails(KERNEL, "malformed property reg");
    Tree::virt().set(KERNEL, "reg", reg(0x5000_0000, 0)).fails(KERNEL, "empty");
    Tree::virt().set(KERNEL, "reg", reg(0x5000_0000, u64::MAX)).fails(KERNEL, "beyond 48-bit addresses");
    Tree::virt().set("/chosen", "#address-cells", 1_u32).fails(RAMDISK, "malformed property reg");
}

#[test]
fn kernel_outside_ram() {
    Tree::virt().set(KERNEL, "reg", reg(0, 0x1000)).fails(KERNEL, "0x0-0xfff is not in one piece of RAM");
    Tree::virt().set(KERNEL, "reg", reg(0xbfff_f000, 0x1001)).fails(KERNEL, "not in one piece of RAM");
}

#[test]
fn modules_that_overlap() {
    Tree::virt().set(RAMDISK, "reg", reg(0x5000_1000, 0x1000)).fails(RAMDISK, "overlaps the kernel at 0x50000000");
}

#[test]
fn modules_of_no_kind_and_twice() {
    Tree::virt().set(KERNEL, "compatible", "multiboot,module").fails(KERNEL, "neither");
    Tree::virt()
        .set(RAMDISK, "compatible", &["multiboot,module", "multiboot,kernel"][..])
        .fails(KERNEL, "a module of this kind already");
}

#[test]
fn half_a_ramdisk_for_linux() {
    let none = || Tree::virt().remove("/chosen", &RAMDISK[8..]);
    let (start, end) = ("linux,initrd-start", "linux,initrd-end");
    none().set("/chosen", start, 0x6000_0000_u64).fails("/chosen", "no property linux,initrd-end");
    none().set("/chosen", end, 0x6000_0000_u64).fails("/chosen", "no property linux,initrd-start");
    let with = |from: u64, to: u64| none().set("/chosen", start, from).set("/chosen", end, to);
    with(0x6000_0000, 0x5fff_ffff).fails("/chosen", "linux,initrd-end (before the start)");
    with(0x6000_0000, 0x6000_0000).fails("/chosen", "empty");
    with(0x1000, 0x2000).fails("/chosen", "0x1000-0x1fff is not in one piece of RAM");
    with(0x6000_0000, 0x7000_0000)
        .cells("/chosen", start, [0, 0, 1])
        .fails("/chosen", "malformed property linux,initrd-start");
}

#[test]
fn reserved_memory() {
    let tree = Tree::virt().add("/", "reserved-memory").set("/reserved-memory", "#address-cells", 2_u32);
    tree.clone().fails("/reserved-memory", "they differ from the root's");
    let tree = tree.set("/reserved-memory", "#size-cells", 2_u32).add("/reserved-memory", "tee");
    tree.clone().cells("/reserved-memory/tee", "reg", [1]).fails("/reserved-memory/tee", "malformed property reg");
    tree.set("/reserved-memory/tee", "reg", reg(1, u64::MAX)).fails("/reserved-memory/tee", "beyond 48-bit");

    let mut tree = Tree::virt();
    let entry = dtoolkit::memreserve::MemoryReservation::new(0x4000_0000, 0x1000);
    tree.0.memory_reservations.extend([entry; 65]);
    tree.fails("/memreserve/", "more than 64 reserved regions");
}

#[test]
fn long_names_are_cut_off() {
    let unit = "1".repeat(80);
    let name = format!("memory@{unit}");
    let tree = Tree::virt().add("/", &name);
    let tree = tree.set(&format!("/{name}"), "device_type", "memory");
    tree.fails(&format!("/{name}")[..48], "no property reg");
}

#[track_caller]
fn host_fails(tree: &Tree, header: &[u8], what: &str) {
    let dtb = tree.dtb();
    let platform = Platform::parse(&dtb).unwrap();
    let message = HostImage::inspect(&platform, header).expect_err("the kernel cannot run").to_string();
    assert!(message.contains(what), "{message}");
}

#[test]
fn images_that_cannot_run() {
    let virt = Tree::virt();
    let kernel = |what| format!("{KERNEL}: {what}");
    host_fails(&virt, &image_header(0, 0x1000, 1), &kernel("the kernel is a big-endian Image"));
    host_fails(&virt, &image_header(0x8_0000, 0x1000, 0), "the Image is not at its text offset");
    host_fails(&virt, &image_header(u64::MAX, 0x1000, 0), "the Image is not at its text offset");
    host_fails(&virt, &image_header(0, 0, 0), "the Image is not at its text offset");
    host_fails(&virt, &image_header(0, u64::MAX, 0), &kernel("0xffffffffffffffff bytes at 0x50000000"));
    host_fails(&virt, &image_header(0, 0x8000_0000, 0), "is not in one piece of RAM");
    let what = format!("{RAMDISK}: 0x58000000-0x58018fff overlaps the memory that the kernel needs");
    host_fails(&virt, &image_header(0, 0x800_1000, 0), &what);
    let odd = virt.set(KERNEL, "reg", reg(0x5000_0002, 0x1000));
    host_fails(&odd, &[0; 64], &kernel("0x1000 bytes at 0x50000002: the flat binary is not aligned"));
}

#[track_caller]
fn plan_fails(tree: &Tree, demand: &Demand, what: &str) {
    let dtb = tree.dtb();
    let platform = Platform::parse(&dtb).unwrap();
    let message = Layout::plan(&platform, &host(&platform), demand).expect_err("there is no layout").to_string();
    assert!(message.contains(what), "{message}");
}

#[test]
fn modules_on_top_of_us() {
    let demand = demand();
    let on_us = Tree::virt().set(KERNEL, "reg", reg(0x4020_0000, 0x1000));
    plan_fails(&on_us, &demand, "/chosen/module@0x50000000: 0x40200000-0x40200fff overlaps the hypervisor's image at");
    let on_dtb = Tree::virt().set(RAMDISK, "reg", reg(0x4800_0100, 0x1000));
    plan_fails(&on_dtb, &demand, "/chosen/module@0x58000000: 0x48000000-0x48001fff overlaps the device tree at");
}

#[test]
fn no_room() {
    let demand = demand();
    plan_fails(&Tree::virt(), &Demand { image_size: 1 << 40, ..demand }, "/: no room for the hypervisor of 0x100");
    plan_fails(&Tree::virt(), &Demand { image_size: u64::MAX, ..demand }, "/: no room for the hypervisor");
    let all = PhysRange::new(0x4000_0000, 1 << 19).unwrap();
    let mut tree = Tree::virt();
    let entry = dtoolkit::memreserve::MemoryReservation::new(all.base().raw(), all.size());
    tree.0.memory_reservations.push(entry);
    plan_fails(&tree, &demand, "/: no room for the host's device tree of 0x");
}

#[test]
fn no_room_for_the_host_dtb() {
    let platform = Platform::parse(GIC_V3).unwrap();
    let carve_out = PhysRange::new(0xb000_0000, 512).unwrap();
    let error = platform.write_host_dtb(carve_out, &mut [0; 0x2000]).unwrap_err();
    assert_eq!(error.to_string(), "/: no room for the device tree of 0x2000 bytes");
}

#[test]
fn an_absurd_size() {
    let mut dtb = GIC_V3.to_vec();
    for (size, found) in [(MAX_DTB_SIZE, true), (MAX_DTB_SIZE + 1, false), (39, false)] {
        dtb[4..8].copy_from_slice(&u32::try_from(size).unwrap().to_be_bytes());
        assert_eq!(dtb_size(&dtb), found.then_some(size));
    }
}
