//! Device trees out of few bytes: those of QEMU, edited.

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use dtoolkit::{
    Node,
    fdt::Fdt,
    memreserve::MemoryReservation,
    model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty},
};
use ravelin_memory::{PAGE_SIZE, PhysRange};
use ravelin_platform::Demand;

/// QEMU's `virt` with a GICv3, a kernel and a ramdisk, and the same with a GICv2 and neither. Without the nodes of devices that
/// Ravelin does not look at, which are most of both.
static TREES: LazyLock<[DeviceTree; 2]> = LazyLock::new(|| {
    [
        &include_bytes!("../../../../hyp/platform/tests/data/virt-gicv3.dtb")[..],
        &include_bytes!("../../../../hyp/platform/tests/data/virt-gicv2.dtb")[..],
    ]
    .map(|dtb| {
        let mut tree = DeviceTree::from_fdt(&Fdt::new(dtb).expect("QEMU's"));
        let names: Vec<_> = tree.root.children().map(|child| child.name().to_owned()).collect();
        for name in names.iter().filter(|name| DEVICES.iter().any(|device| name.starts_with(device))) {
            tree.root.remove_child(name);
        }
        tree
    })
});

const DEVICES: [&str; 7] = ["virtio_mmio", "pcie", "flash", "fw-cfg", "gpio", "pmu", "platform-bus"];

/// All that the first stage of the hypervisor has to do with.
#[derive(Arbitrary, Debug)]
pub(super) struct Input {
    source: Source,
    /// Whether the kernel is an Image, and what its header says.
    image: Option<[u64; 3]>,
    image_size: u32,
    running: (Place, u8),
    dtb: Place,
}

#[derive(Arbitrary, Debug)]
enum Source {
    Edited(Edits),
    /// Bytes in place of some, in 32 bits.
    Patched(Edits, Vec<(u16, u32)>),
    /// Behind a header that is right.
    Blocks {
        structure: Vec<u8>,
        strings: Vec<u8>,
    },
    Raw(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Edits {
    tree: bool,
    edits: Vec<Edit>,
}

#[derive(Arbitrary, Debug)]
enum Edit {
    Set {
        node: u8,
        property: u8,
        value: Value,
    },
    Unset {
        node: u8,
        property: u8,
    },
    Add {
        parent: u8,
        name: u8,
    },
    Remove {
        parent: u8,
        child: u8,
    },
    /// Has a node describe RAM, mostly one of its own.
    Ram {
        name: Option<u8>,
        base: Place,
        size: Place,
    },
    Reserve {
        base: Place,
        size: u64,
    },
}

#[derive(Arbitrary, Debug)]
enum Value {
    Text(u8),
    Cell(u32),
    Region(Place, Place),
    Cells(Vec<u32>),
    Bytes(Vec<u8>),
}

/// An address or a size, such as they are.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Blocks(u16),
    Pages(u32),
    Any(u64),
}

/// Names of nodes that mean something.
const NODES: [&str; 14] = [
    "memory@40000000",
    "memory@80000000",
    "memory",
    "chosen",
    "reserved-memory",
    "module@50000000",
    "module@60000000",
    "cpus",
    "cpu@0",
    "cpu@100",
    "aliases",
    "psci",
    "intc@8000000",
    "soc",
];

/// Names of properties that do.
const PROPERTIES: [&str; 17] = [
    "reg",
    "#address-cells",
    "#size-cells",
    "device_type",
    "status",
    "compatible",
    "ranges",
    "bootargs",
    "stdout-path",
    "linux,initrd-start",
    "linux,initrd-end",
    "#redistributor-regions",
    "method",
    "enable-method",
    "no-map",
    "serial0",
    "phandle",
];

/// Values that do.
const TEXTS: [&str; 20] = [
    "memory",
    "okay",
    "disabled",
    "fail",
    "cpu",
    "psci",
    "smc",
    "hvc",
    "arm,pl011",
    "arm,gic-v3",
    "arm,psci-1.0",
    "multiboot,module",
    "multiboot,module\0multiboot,kernel",
    "multiboot,module\0multiboot,ramdisk",
    "serial0:115200",
    "/pl011@9000000",
    "loglevel=debug exit=semihosting",
    "loglevel=",
    "simple-bus",
    "",
];

impl Place {
    fn number(self) -> u64 {
        match self {
            Self::Blocks(blocks) => u64::from(blocks) << 21,
            Self::Pages(pages) => u64::from(pages) * PAGE_SIZE,
            Self::Any(number) => number,
        }
    }

    /// The range of so many pages, wherever there can be such.
    fn range(self, pages: u64) -> PhysRange {
        let base = self.number() & 0x7fff_ffff_f000;
        PhysRange::new(base, pages.max(1)).expect("far below the last address")
    }
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        let cells = |cells: &[u32]| cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        match self {
            Self::Text(text) => [TEXTS[usize::from(*text) % TEXTS.len()].as_bytes(), b"\0"].concat(),
            Self::Cell(cell) => cell.to_be_bytes().to_vec(),
            Self::Region(base, size) => [base.number().to_be_bytes(), size.number().to_be_bytes()].concat(),
            Self::Cells(list) => cells(list),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

impl Edits {
    fn dtb(&self) -> Vec<u8> {
        let mut tree = TREES[usize::from(self.tree)].clone();
        self.edits.iter().for_each(|edit| edit.apply(&mut tree));
        tree.to_dtb()
    }
}

/// Returns the node of this number in the order of the tree, if there are so many.
fn node(tree: &mut DeviceTree, mut number: u8) -> Option<&mut DeviceTreeNode> {
    find(&mut tree.root, &mut number)
}

fn find<'a>(node: &'a mut DeviceTreeNode, left: &mut u8) -> Option<&'a mut DeviceTreeNode> {
    if *left == 0 {
        return Some(node);
    }
    *left -= 1;
    node.children_mut().find_map(|child| find(child, left))
}

impl Edit {
    fn apply(&self, tree: &mut DeviceTree) {
        let name = |names: &[&'static str], index: u8| names[usize::from(index) % names.len()];
        match self {
            Self::Set { node: at, property, value } => {
                let property = DeviceTreeProperty::new_unchecked(name(&PROPERTIES, *property), value.bytes());
                if let Some(node) = node(tree, *at) {
                    node.add_property(property);
                }
            }
            Self::Unset { node: at, property } => {
                if let Some(node) = node(tree, *at) {
                    node.remove_property(name(&PROPERTIES, *property));
                }
            }
            Self::Add { parent, name: child } => {
                if let Some(node) = node(tree, *parent) {
                    node.add_child(DeviceTreeNode::new_unchecked(name(&NODES, *child)));
                }
            }
            Self::Remove { parent, child } => {
                let Some(node) = node(tree, *parent) else { return };
                let child = (*node).children().nth((*child).into()).map(|child| child.name().to_owned());
                if let Some(child) = child {
                    node.remove_child(&child);
                }
            }
            Self::Ram { name: other, base, size } => {
                let own = format!("memory@{:x}", base.number());
                let name = other.map_or(&*own, |index| name(&NODES, index));
                let mut memory = tree.root.remove_child(name).unwrap_or_else(|| DeviceTreeNode::new_unchecked(name));
                memory.add_property(DeviceTreeProperty::new_unchecked("device_type", "memory"));
                memory.add_property(DeviceTreeProperty::new_unchecked("reg", Value::Region(*base, *size).bytes()));
                tree.root.add_child(memory);
            }
            Self::Reserve { base, size } => {
                tree.memory_reservations.push(MemoryReservation::new(base.number(), *size));
            }
        }
    }
}

impl Input {
    /// The device tree.
    pub(super) fn dtb(&self) -> Vec<u8> {
        match &self.source {
            Source::Edited(edits) => edits.dtb(),
            Source::Patched(edits, patches) => {
                let mut dtb = edits.dtb();
                for (at, value) in patches {
                    let at = usize::from(*at) * 4 % dtb.len();
                    if let Some(cell) = dtb.get_mut(at..at + 4) {
                        cell.copy_from_slice(&value.to_be_bytes());
                    }
                }
                dtb
            }
            Source::Blocks { structure, strings } => {
                const HEADER: usize = 56;
                let structure_end = HEADER + structure.len();
                let size = structure_end + strings.len();
                let fields = [0xd00d_feed, size, HEADER, structure_end, 40, 17, 16, 0, strings.len(), structure.len()];
                let header = fields.iter().flat_map(|&field| (field as u32).to_be_bytes());
                header.chain([0; 16]).chain(structure.iter().copied()).chain(strings.iter().copied()).collect()
            }
            Source::Raw(bytes) => bytes.clone(),
        }
    }

    /// The start of the kernel.
    pub(super) fn header(&self) -> Vec<u8> {
        let Some([text_offset, image_size, flags]) = self.image else { return vec![0; 64] };
        let words = [0, text_offset, image_size, flags, 0, 0, 0, u64::from_le_bytes(*b"ARM\x64\0\0\0\0")];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// What the hypervisor needs.
    pub(super) fn demand(&self) -> Demand {
        let (running, pages) = self.running;
        Demand { image_size: self.image_size.into(), running: running.range(pages.into()), dtb: self.dtb.range(256) }
    }
}
