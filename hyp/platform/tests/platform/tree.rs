//! Device trees to test with: QEMU's, and what becomes of it by edits.

use dtoolkit::{
    ToPropertyValue,
    fdt::Fdt,
    model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty},
};
use ravelin_memory::PhysRange;
use ravelin_platform::{Demand, HostImage, Platform};

/// `-machine virt,gic-version=3,virtualization=on -smp 2 -m 2G` with a kernel and a ramdisk by guest-loader, packed.
pub(crate) const GIC_V3: &[u8] = include_bytes!("../data/virt-gicv3.dtb");

/// The same with `gic-version=2` and without modules.
pub(crate) const GIC_V2: &[u8] = include_bytes!("../data/virt-gicv2.dtb");

pub(crate) const RAM_BASE: u64 = 0x4000_0000;
pub(crate) const KERNEL: &str = "/chosen/module@0x50000000";
pub(crate) const RAMDISK: &str = "/chosen/module@0x58000000";

/// A device tree that can be edited.
#[derive(Clone)]
pub(crate) struct Tree(pub(crate) DeviceTree);

impl Tree {
    /// QEMU's device tree.
    pub(crate) fn virt() -> Self {
        Self(DeviceTree::from_fdt(&Fdt::new(GIC_V3).unwrap()))
    }

    fn node(&mut self, path: &str) -> &mut DeviceTreeNode {
        if path == "/" {
            return &mut self.0.root;
        }
        self.0.find_node_mut(path).unwrap_or_else(|| panic!("no node {path}"))
    }

    /// Sets a property.
    pub(crate) fn set(mut self, path: &str, name: &str, value: impl ToPropertyValue) -> Self {
        let property = DeviceTreeProperty::new(name, value).unwrap();
        self.node(path).add_property(property);
        self
    }

    /// Sets a property to these cells.
    pub(crate) fn cells<const N: usize>(self, path: &str, name: &str, value: [u32; N]) -> Self {
        self.set(path, name, value)
    }

    /// Removes a property.
    pub(crate) fn unset(mut self, path: &str, name: &str) -> Self {
        assert!(self.node(path).remove_property(name).is_some(), "no {name} in {path}");
        self
    }

    /// Adds an empty node to `parent`.
    pub(crate) fn add(mut self, parent: &str, name: &str) -> Self {
        let node = DeviceTreeNode::new(name).unwrap();
        self.node(parent).add_child(node);
        self
    }

    /// Removes a node from `parent`.
    pub(crate) fn remove(mut self, parent: &str, name: &str) -> Self {
        assert!(self.node(parent).remove_child(name).is_some(), "no {name} in {parent}");
        self
    }

    /// Replaces RAM by these regions, one node each.
    pub(crate) fn ram(mut self, regions: &[(u64, u64)]) -> Self {
        self = self.remove("/", "memory@40000000");
        for (base, size) in regions {
            let name = format!("memory@{base:x}");
            let path = format!("/{name}");
            self = self.add("/", &name).set(&path, "device_type", "memory").set(&path, "reg", &reg(*base, *size)[..]);
        }
        self
    }

    /// Replaces the CPUs by `count` of them.
    pub(crate) fn cpus(mut self, count: u32) -> Self {
        self = self.remove("/", "cpus").add("/", "cpus");
        self = self.set("/cpus", "#address-cells", 1_u32).set("/cpus", "#size-cells", 0_u32);
        for cpu in 0..count {
            // 16 to a cluster, as QEMU has it with a GICv3.
            let affinity = (cpu / 16) << 8 | (cpu % 16);
            let path = format!("/cpus/cpu@{affinity:x}");
            self = self.add("/cpus", &format!("cpu@{affinity:x}")).set(&path, "reg", affinity);
        }
        let redistributors = [0, 0x800_0000, 0, 0x1_0000, 0, 0x80a_0000, 0, count.max(123) * 0x2_0000];
        self.cells("/intc@8000000", "reg", redistributors)
    }

    pub(crate) fn dtb(&self) -> Vec<u8> {
        self.0.to_dtb()
    }

    /// Makes sure that parsing fails, and that the message blames `node` and says `what`.
    #[track_caller]
    pub(crate) fn fails(&self, node: &str, what: &str) {
        let message = Platform::parse(&self.dtb()).expect_err("the device tree is broken").to_string();
        assert!(message.starts_with(&format!("{node}: ")), "{message}");
        assert!(message.contains(what), "{message}");
    }
}

/// The cells of an address and a size of two cells each.
pub(crate) fn reg(base: u64, size: u64) -> [u32; 4] {
    [(base >> 32) as u32, base as u32, (size >> 32) as u32, size as u32]
}

/// The start of an arm64 Image.
pub(crate) fn image_header(text_offset: u64, image_size: u64, flags: u64) -> [u8; 64] {
    let mut header = [0; 64];
    header[8..16].copy_from_slice(&text_offset.to_le_bytes());
    header[16..24].copy_from_slice(&image_size.to_le_bytes());
    header[24..32].copy_from_slice(&flags.to_le_bytes());
    header[56..60].copy_from_slice(b"ARM\x64");
    header
}

/// The host of QEMU's device tree, an Image of 16 MiB.
pub(crate) fn host(platform: &Platform<'_>) -> HostImage {
    HostImage::inspect(platform, &image_header(0, 16 << 20, 0)).unwrap()
}

/// What QEMU's placement of a hypervisor of 128 KiB demands.
pub(crate) fn demand() -> Demand {
    Demand {
        image_size: 128 << 10,
        running: PhysRange::new(RAM_BASE + (2 << 20), 32).unwrap(),
        dtb: PhysRange::new(RAM_BASE + (128 << 20), 256).unwrap(),
    }
}
