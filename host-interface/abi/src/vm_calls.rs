//! The part of the table that is about VMs.

use crate::{
    GIC_FRAME_SIZE, MAX_VCPUS, PAGE_SIZE, VmCall,
    calls::{Argument, Call, FIRST_FAILED, Kind, MAX_RANGE_PAGES, MAX_TAKE_BACK_PAGES, STATUS},
    registers::REGISTER_LAST,
    request::HostCall,
};

/// Number of the call that is looked for before all others.
pub(crate) const VCPU_RUN: u32 = 0xc600_1016;

const HANDLE: Argument = Argument { name: "handle", kind: Kind::Handle };
const ATTRIBUTES: Argument = Argument { name: "attributes", kind: Kind::Attributes };
const ADDRESS: Argument = Argument { name: "address", kind: Kind::PageAddress };
const GUEST_PAGE: Argument = Argument { name: "guest_address", kind: Kind::GuestAddress { align: PAGE_SIZE } };
const VCPU: Argument = Argument { name: "vcpu", kind: Kind::Number { first: 0, last: MAX_VCPUS - 1 } };
const REGISTER: Argument = Argument { name: "register", kind: Kind::Number { first: 0, last: REGISTER_LAST } };
const PAGES: Argument = Argument { name: "pages", kind: Kind::PageCount { max: MAX_RANGE_PAGES } };
const FEW_PAGES: Argument = Argument { name: "pages", kind: Kind::PageCount { max: MAX_TAKE_BACK_PAGES } };

const FIRST_FAILED_FRAME: &str = "0, or after a failure the guest address of the first page that failed";

/// Those about VMs.
pub(crate) const VM_CALLS: &[Call] = &[
    Call {
        number: 0xc600_100e,
        name: "VCPU_GET_REGISTER",
        doc: "Returns a register of a vCPU that does not run, of an ordinary VM: of others it is WRONG_STATE.",
        arguments: &[HANDLE, VCPU, REGISTER],
        results: &[STATUS, "value"],
        request: |parsed| {
            HostCall::Vm(VmCall::GetRegister {
                handle: parsed.value(0),
                index: parsed.value(1),
                register: parsed.value(2),
            })
        },
    },
    Call {
        number: 0xc600_100f,
        name: "VCPU_SET_REGISTER",
        doc: "Sets a register of a vCPU that does not run, of an ordinary VM: of others it is WRONG_STATE. What is set \
              before the VM is sealed stays, but for what the seal sets: program counter, x0 and power of vCPU 0.",
        arguments: &[
            HANDLE,
            VCPU,
            REGISTER,
            Argument { name: "value", kind: Kind::Number { first: 0, last: u64::MAX } },
        ],
        results: &[STATUS, "0"],
        request: |parsed| {
            HostCall::Vm(VmCall::SetRegister {
                handle: parsed.value(0),
                index: parsed.value(1),
                register: parsed.value(2),
                value: parsed.value(3),
            })
        },
    },
    Call {
        number: 0xc600_1010,
        name: "VM_CREATE",
        doc: "Makes a VM in pages that the host donates with the call, as many as VM_SIZES says.",
        arguments: &[ATTRIBUTES, ADDRESS, FEW_PAGES],
        results: &[STATUS, "handle of the VM, never used before"],
        request: |parsed| HostCall::Vm(VmCall::Create { attributes: parsed.attributes(0), metadata: parsed.range(1) }),
    },
    Call {
        number: 0xc600_1011,
        name: "VM_DONATE_TABLES",
        doc: "Gives a VM pages that the host owns, for its translation tables. One that is being torn down may need some, too.",
        arguments: &[HANDLE, ADDRESS, FEW_PAGES],
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Vm(VmCall::DonateTables { handle: parsed.value(0), tables: parsed.range(1) }),
    },
    Call {
        number: 0xc600_1012,
        name: "VCPU_CREATE",
        doc: "Makes a vCPU in pages that the host donates with the call, as many as VM_SIZES says. The host owns the run \
              page and goes on using it; it cannot be unshared or given away while the vCPU exists. Only a VM that is not \
              sealed yet takes vCPUs. The vCPU of index 0 starts when the VM is sealed, others when the guest says so.",
        arguments: &[HANDLE, VCPU, ADDRESS, FEW_PAGES, Argument { name: "run_page", kind: Kind::PageAddress }],
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| {
            HostCall::Vm(VmCall::CreateVcpu {
                handle: parsed.value(0),
                index: parsed.value(1),
                metadata: parsed.range(2),
                run_page: parsed.value(4),
            })
        },
    },
    Call {
        number: 0xc600_1013,
        name: "VM_MAP",
        doc: "Puts pages that the host owns at a guest address, with their contents. A protected VM becomes their owner and \
              the host loses access; to an ordinary one they are lent. What a protected VM gets before it is sealed is \
              measured, and may be 512 pages a call; all else may be 512 pages, or 16 blocks of 2 MiB that are aligned in \
              both places.",
        arguments: &[HANDLE, GUEST_PAGE, ADDRESS, PAGES],
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| {
            HostCall::Vm(VmCall::Map { handle: parsed.value(0), at: parsed.value(1), range: parsed.range(2) })
        },
    },
    Call {
        number: 0xc600_1014,
        name: "VM_UNMAP",
        doc: "Takes pages that are lent to an ordinary VM from it. A call does 512 pages at \
              most, or blocks of 2 MiB that are contiguous memory.",
        arguments: &[HANDLE, GUEST_PAGE, PAGES],
        results: &[STATUS, FIRST_FAILED_FRAME],
        request: |parsed| HostCall::Vm(VmCall::Unmap { handle: parsed.value(0), range: parsed.range(1) }),
    },
    Call {
        number: 0xc600_1015,
        name: "VM_SEAL",
        doc: "Ends the making of a VM: fixes its measurement, where its vCPU 0 starts with the address of the device tree in \
              x0, and where the guest finds its interrupt controller, a GICv3: a distributor of 64 KiB, and redistributors of \
              128 KiB for each vCPU that it may have. Neither may overlap the other or pages of the guest, then or later.",
        arguments: &[
            HANDLE,
            Argument { name: "entry", kind: Kind::GuestAddress { align: 4 } },
            Argument { name: "device_tree", kind: Kind::GuestAddress { align: 8 } },
            Argument { name: "distributor", kind: Kind::GuestAddress { align: GIC_FRAME_SIZE } },
            Argument { name: "redistributors", kind: Kind::GuestAddress { align: GIC_FRAME_SIZE } },
        ],
        results: &[STATUS, "0"],
        request: |parsed| {
            HostCall::Vm(VmCall::Seal {
                handle: parsed.value(0),
                entry: parsed.value(1),
                device_tree: parsed.value(2),
                distributor: parsed.value(3),
                redistributors: parsed.value(4),
            })
        },
    },
    Call {
        number: VCPU_RUN,
        name: "VCPU_RUN",
        doc: "Runs a vCPU of a sealed VM until something needs the host. The run page says what.",
        arguments: &[HANDLE, VCPU],
        results: &[STATUS, "0"],
        request: |parsed| HostCall::Run { handle: parsed.value(0), index: parsed.value(1) },
    },
    Call {
        number: 0xc600_1017,
        name: "VM_TEARDOWN",
        doc: "Ends the life of a VM, none of whose vCPUs may be running. From then on its pages can be reclaimed, and nothing \
              else can be done with it.",
        arguments: &[HANDLE],
        results: &[STATUS, "0"],
        request: |parsed| HostCall::Vm(VmCall::Teardown { handle: parsed.value(0) }),
    },
    Call {
        number: 0xc600_1018,
        name: "VM_RECLAIM",
        doc: "Returns the pages of a VM that is being torn down to the host: zeroed if they were the guest's alone, with their \
              contents if they were shared. Guest addresses without a page are passed over. Long ranges are done in part.",
        arguments: &[HANDLE, GUEST_PAGE, PAGES],
        results: &[
            STATUS,
            "pages that are done, the first ones; after a failure the guest address of the first page that failed, or 0",
        ],
        request: |parsed| HostCall::Vm(VmCall::Reclaim { handle: parsed.value(0), range: parsed.range(1) }),
    },
    Call {
        number: 0xc600_1019,
        name: "VM_DESTROY",
        doc: "Returns what the host has donated for a VM that is being torn down, zeroed, up to 512 pages a call. It is BUSY \
              while the VM has pages that have not been reclaimed. When nothing is left to return, the handle has no meaning \
              any more.",
        arguments: &[HANDLE],
        results: &[STATUS, "pages left to return: call again unless 0"],
        request: |parsed| HostCall::Vm(VmCall::Destroy { handle: parsed.value(0) }),
    },
    Call {
        number: 0xc600_101a,
        name: "CLAIM",
        doc: "Takes up a guest's offer: the host may access the pages until it releases them. A call does 512 pages at \
              most, or blocks of 2 MiB that are contiguous memory.",
        arguments: &[HANDLE, GUEST_PAGE, PAGES],
        results: &[STATUS, FIRST_FAILED_FRAME],
        request: |parsed| HostCall::Vm(VmCall::Claim { handle: parsed.value(0), range: parsed.range(1) }),
    },
    Call {
        number: 0xc600_101b,
        name: "RELEASE",
        doc: "Ends the host's access to pages that it has claimed. They stay offered. A call does 512 pages at \
              most, or blocks of 2 MiB that are contiguous memory.",
        arguments: &[HANDLE, GUEST_PAGE, PAGES],
        results: &[STATUS, FIRST_FAILED_FRAME],
        request: |parsed| HostCall::Vm(VmCall::Release { handle: parsed.value(0), range: parsed.range(1) }),
    },
    Call {
        number: 0xc600_101c,
        name: "FORCE_RECLAIM",
        doc: "Takes pages that the host has no access to, private or offered, from a guest that is alive and returns them to the host, \
              zeroed. The guest gets an abort where they were, from then on.",
        arguments: &[ADDRESS, FEW_PAGES],
        results: &[STATUS, FIRST_FAILED],
        request: |parsed| HostCall::Vm(VmCall::ForceReclaim { range: parsed.range(0) }),
    },
    Call {
        number: 0xc600_101d,
        name: "SPI",
        doc: "Sets the level of one of a sealed VM's shared peripheral interrupts, those of the devices that the host plays. \
              Bit n of the result is set if vCPU n has something to do now: the host runs it if it waits, and interrupts the CPU \
              that it runs on.",
        arguments: &[
            HANDLE,
            Argument { name: "intid", kind: Kind::Number { first: 32, last: 1019 } },
            Argument { name: "level", kind: Kind::Number { first: 0, last: 1 } },
        ],
        results: &[STATUS, "vCPUs 0 to 63 to wake", "vCPUs 64 to 127 to wake"],
        request: |parsed| {
            HostCall::Vm(VmCall::Spi { handle: parsed.value(0), intid: parsed.value(1), level: parsed.value(2) != 0 })
        },
    },
    Call {
        number: 0xc600_101e,
        name: "VM_SIZES",
        doc: "Says how many pages the host has to donate for a VM of these attributes and for each of its vCPUs.",
        arguments: &[ATTRIBUTES],
        results: &[
            STATUS,
            "pages for VM_CREATE",
            "pages for VCPU_CREATE",
            "pages of which the address for VM_CREATE is a multiple",
        ],
        request: |parsed| HostCall::Vm(VmCall::Sizes { attributes: parsed.attributes(0) }),
    },
    Call {
        number: 0xc600_101f,
        name: "REGISTER_RESET_VALUE",
        doc: "Returns what a system register holds when vCPU 0 of a VM of these attributes starts; no such VM has to exist. A \
              register that there is not, or not in such a VM, is INVALID.",
        arguments: &[ATTRIBUTES, REGISTER],
        results: &[STATUS, "value"],
        request: |parsed| {
            HostCall::Vm(VmCall::ResetValue { attributes: parsed.attributes(0), register: parsed.value(1) })
        },
    },
];
