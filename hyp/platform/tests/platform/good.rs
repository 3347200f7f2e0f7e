//! Device trees without faults.

use ravelin_memory::PhysRange;
use ravelin_platform::{Conduit, HostImage, LogLevel, MAX_HOST_DTB_SIZE, Platform, dtb_size, find_console};

use crate::tree::{GIC_V2, GIC_V3, KERNEL, RAMDISK, Tree, image_header, reg};

fn range(base: u64, size: u64) -> PhysRange {
    PhysRange::from_bounds(base, base + size).unwrap()
}

#[test]
fn qemu_with_guest_loader() {
    let platform = Platform::parse(GIC_V3).unwrap();
    assert_eq!(platform.ram[..], [range(0x4000_0000, 2 << 30)]);
    assert_eq!(platform.reserved[..], []);
    assert_eq!(platform.cpus().collect::<Vec<_>>(), [0, 1]);
    assert_eq!(platform.cpu_count(), 2);
    assert_eq!(platform.uart, range(0x900_0000, 0x1000));
    assert_eq!(platform.gic.distributor, range(0x800_0000, 0x1_0000));
    assert_eq!(platform.gic.redistributors[..], [range(0x80a_0000, 0xf6_0000)]);
    assert_eq!(platform.psci, Conduit::Smc);
    assert_eq!(platform.options.log_level, Some(LogLevel::Debug));
    assert!(platform.options.semihosting_exit);
    assert_eq!(platform.options.unknown, None);
    assert_eq!(platform.kernel.node.as_str(), KERNEL);
    assert_eq!((platform.kernel.bytes.base(), platform.kernel.bytes.size()), (0x5000_0000, 3_000_000));
    assert_eq!(platform.kernel.bytes.pages(), range(0x5000_0000, 0x2d_d000));
    assert_eq!(platform.kernel.bootargs, "console=ttyAMA0 quiet");
    let ramdisk = platform.ramdisk.unwrap();
    assert_eq!(ramdisk.node.as_str(), RAMDISK);
    assert_eq!((ramdisk.bytes.base(), ramdisk.bytes.end()), (0x5800_0000, 0x5800_0000 + 100_000));
}

#[test]
fn room_may_be_left_in_it() {
    let mut dtb = GIC_V3.to_vec();
    let size = 3 << 20;
    dtb[4..8].copy_from_slice(&u32::to_be_bytes(3 << 20));
    dtb.resize(size, 0);
    let platform = Platform::parse(&dtb).unwrap();
    let written = platform.write_host_dtb(PhysRange::new(0x7f00_0000, 512).unwrap(), &mut vec![0; size]).unwrap();
    assert!(written <= MAX_HOST_DTB_SIZE);
}

#[test]
fn bytes_may_follow() {
    let mut dtb = GIC_V3.to_vec();
    assert_eq!(dtb_size(&dtb[..8]), Some(dtb.len()));
    dtb.resize(1 << 20, 0xff);
    assert!(Platform::parse(&dtb).is_ok());
    assert_eq!(dtb_size(&dtb[..7]), None);
    dtb[0] = 0;
    assert_eq!(dtb_size(&dtb), None);
}

#[test]
fn ram_of_several_nodes_is_sorted_and_merged() {
    let tree = Tree::virt()
        .ram(&[(0x8000_0000, 0x1000_0000), (0x1_0000_0000, 0x4000_0000), (0x4000_0000, 0x4000_0000)])
        .cells("/memory@100000000", "reg", [1, 0, 0, 0x1000, 0, 0x9000_0000, 0, 0x7000_0000]);
    let dtb = tree.dtb();
    assert_eq!(Platform::parse(&dtb).unwrap().ram[..], [range(0x4000_0000, 0xc000_1000)]);

    let dtb = Tree::virt().ram(&[(0x8_0000_0000, 0x4000_0000), (0x4000_0000, 0x4000_0000)]).dtb();
    let platform = Platform::parse(&dtb).unwrap();
    assert_eq!(platform.ram[..], [range(0x4000_0000, 0x4000_0000), range(0x8_0000_0000, 0x4000_0000)]);
    assert_eq!(platform.ram_size(), 2 << 30);
}

#[test]
fn memory_of_the_secure_world_is_not_ours() {
    let dtb = Tree::virt()
        .add("/", "secram@e000000")
        .set("/secram@e000000", "device_type", "memory")
        .set("/secram@e000000", "status", "disabled")
        .set("/secram@e000000", "reg", reg(0xe00_0000, 0x100_0000))
        .dtb();
    assert_eq!(Platform::parse(&dtb).unwrap().ram.len(), 1);
}

#[test]
fn cells_may_be_single() {
    let dtb = Tree::virt()
        .set("/", "#address-cells", 1_u32)
        .set("/", "#size-cells", 1_u32)
        .cells("/memory@40000000", "reg", [0x4000_0000, 0x8000_0000])
        .cells("/pl011@9000000", "reg", [0x900_0000, 0x1000])
        .cells("/intc@8000000", "reg", [0x800_0000, 0x1_0000, 0x80a_0000, 0xf6_0000])
        .cells(KERNEL, "reg", [0x5000_0000, 0x1000])
        .cells(RAMDISK, "reg", [0x5800_0000, 0x1000])
        .dtb();
    let platform = Platform::parse(&dtb).unwrap();
    assert_eq!(platform.kernel.bytes.pages(), range(0x5000_0000, 0x1000));
    assert_eq!(platform.ram_size(), 2 << 30);
}

#[test]
fn cpus_that_failed_do_not_count_and_disabled_ones_do() {
    let dtb = Tree::virt()
        .cpus(4)
        .set("/cpus/cpu@1", "status", "fail")
        .set("/cpus/cpu@2", "status", "disabled")
        .set("/cpus/cpu@3", "status", "fail-hot")
        .dtb();
    assert_eq!(Platform::parse(&dtb).unwrap().cpus().collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn affinities_have_four_fields() {
    let dtb = Tree::virt()
        .set("/cpus", "#address-cells", 2_u32)
        .cells("/cpus/cpu@0", "reg", [0xff, 0x00ff_ffff])
        .cells("/cpus/cpu@1", "reg", [0, 0x100])
        .dtb();
    assert_eq!(Platform::parse(&dtb).unwrap().cpus().collect::<Vec<_>>(), [0xff_00ff_ffff, 0x100]);
}

#[test]
fn as_many_cpus_as_there_is_room_for() {
    let dtb = Tree::virt().cpus(256).dtb();
    let platform = Platform::parse(&dtb).unwrap();
    assert_eq!(platform.cpu_count(), 256);
    assert_eq!(platform.cpus().last(), Some(0xf0f));
}

#[test]
fn the_console_is_what_stdout_says() {
    let second = Tree::virt().add("/", "pl011@9040000").set("/pl011@9040000", "compatible", "arm,pl011").set(
        "/pl011@9040000",
        "reg",
        reg(0x904_0000, 0x1000),
    );
    let base = |tree: &Tree| Platform::parse(&tree.dtb()).unwrap().uart.base().raw();
    assert_eq!(base(&second), 0x900_0000);
    let path = second.clone().set("/chosen", "stdout-path", "/pl011@9040000:115200n8");
    assert_eq!(base(&path), 0x904_0000);
    let alias =
        second.clone().set("/aliases", "serial1", "/pl011@9040000").set("/chosen", "stdout-path", "serial1:115200");
    assert_eq!(base(&alias), 0x904_0000);
    // What is no PL011 is of no use, and the first one is the next best.
    assert_eq!(base(&second.clone().set("/chosen", "stdout-path", "/timer")), 0x900_0000);
    assert_eq!(base(&second.set("/pl011@9000000", "status", "disabled").unset("/chosen", "stdout-path")), 0x904_0000);
}

#[test]
fn addresses_go_through_buses() {
    let soc = Tree::virt()
        .remove("/", "pl011@9000000")
        .add("/", "soc")
        .set("/soc", "#address-cells", 1_u32)
        .set("/soc", "#size-cells", 1_u32)
        .cells("/soc", "ranges", [0, 0, 0x700_0000, 0x1000, 0x10_0000, 0, 0x900_0000, 0x10_0000])
        .add("/soc", "serial@140000")
        .set("/soc/serial@140000", "compatible", "arm,pl011")
        .cells("/soc/serial@140000", "reg", [0x14_0000, 0x1000]);
    assert_eq!(Platform::parse(&soc.dtb()).unwrap().uart.base().raw(), 0x904_0000);
    let identity = soc.clone().set("/soc", "ranges", &[0_u32; 0][..]);
    assert_eq!(Platform::parse(&identity.dtb()).unwrap().uart.base().raw(), 0x14_0000);
    soc.clone().unset("/soc", "ranges").fails("/soc/serial@140000", "0x1000 bytes at 0x140000: not in the ranges");
    soc.cells("/soc/serial@140000", "reg", [0x1f_f800, 0x1000]).fails("/soc/serial@140000", "not in the ranges");
}

#[test]
fn options() {
    let with = |line: &str| Tree::virt().set("/chosen", "bootargs", line).dtb();
    let dtb = with("  BOOT_IMAGE=/x loglevel=off quiet ");
    let options = Platform::parse(&dtb).unwrap().options;
    assert_eq!((options.log_level, options.semihosting_exit), (Some(LogLevel::Off), false));
    assert_eq!(options.unknown, Some("BOOT_IMAGE=/x"));
    let dtb = Tree::virt().unset("/chosen", "bootargs").dtb();
    assert_eq!(Platform::parse(&dtb).unwrap().options, Default::default());
}

#[test]
fn ramdisk_in_the_way_of_linux() {
    let none = Tree::virt().remove("/chosen", &RAMDISK[8..]);
    assert_eq!(Platform::parse(&none.dtb()).unwrap().ramdisk, None);
    let wide = none.clone().set("/chosen", "linux,initrd-start", 0x6000_0010_u64);
    let wide = wide.set("/chosen", "linux,initrd-end", 0x6000_0020_u32).dtb();
    let ramdisk = Platform::parse(&wide).unwrap().ramdisk.unwrap();
    assert_eq!((ramdisk.bytes.base(), ramdisk.bytes.size()), (0x6000_0010, 0x10));
    // The module wins.
    let both = Tree::virt()
        .set("/chosen", "linux,initrd-start", 0x6000_0010_u64)
        .set("/chosen", "linux,initrd-end", 0x6000_0020_u64)
        .dtb();
    assert_eq!(Platform::parse(&both).unwrap().ramdisk.unwrap().bytes.base(), 0x5800_0000);
}

#[test]
fn reserved_memory_is_carried_along() {
    let mut tree = Tree::virt()
        .add("/", "reserved-memory")
        .set("/reserved-memory", "#address-cells", 2_u32)
        .set("/reserved-memory", "#size-cells", 2_u32)
        .add("/reserved-memory", "tee@70000000")
        .set("/reserved-memory/tee@70000000", "reg", reg(0x7000_0800, 0x1000))
        .add("/reserved-memory", "pool")
        .set("/reserved-memory/pool", "size", 0x10_0000_u64);
    tree.0.memory_reservations.push(dtoolkit::memreserve::MemoryReservation::new(0x4100_0000, 0x10));
    let dtb = tree.dtb();
    let platform = Platform::parse(&dtb).unwrap();
    assert_eq!(platform.reserved[..], [range(0x4100_0000, 0x1000), range(0x7000_0000, 0x2000)]);
}

#[test]
fn the_console_survives_most_errors() {
    assert!(Platform::parse(GIC_V2).is_err());
    assert_eq!(find_console(GIC_V2), Some(range(0x900_0000, 0x1000)));
    let no_ram = Tree::virt().remove("/", "memory@40000000").dtb();
    assert_eq!(find_console(&no_ram), Some(range(0x900_0000, 0x1000)));
    let in_ram = Tree::virt().set("/pl011@9000000", "reg", reg(0x4900_0000, 0x1000)).dtb();
    assert_eq!(find_console(&in_ram), None);
    assert_eq!(find_console(&[0; 64]), None);
}

#[test]
fn image_and_flat_binary() {
    let platform = Platform::parse(GIC_V3).unwrap();
    let image = HostImage::inspect(&platform, &image_header(0, 0x345_6789, 0b1010)).unwrap();
    assert_eq!(image.entry.raw(), 0x5000_0000);
    assert_eq!(image.footprint, range(0x5000_0000, 0x345_7000));
    // An Image that says less than what there is takes what there is, as does anything else.
    for start in [&image_header(0, 1, 0)[..], &[0x1f; 64], &[0; 3], &[]] {
        assert_eq!(HostImage::inspect(&platform, start).unwrap().footprint, range(0x5000_0000, 0x2d_d000));
    }
    let dtb = Tree::virt().set(KERNEL, "reg", reg(0x5008_0000, 0x1000)).dtb();
    let platform = Platform::parse(&dtb).unwrap();
    for header in [image_header(0x8_0000, 0x10_0000, 0), image_header(0, 0, 0)] {
        assert_eq!(HostImage::inspect(&platform, &header).unwrap().entry.raw(), 0x5008_0000);
    }
}
