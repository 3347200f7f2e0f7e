//! VMs with the guest of the tests in them.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Context;
use ravelin_guest::{BLOCK_SIZE, DEVICE, IMAGE};

use crate::check::{Outcome, works};
use crate::guest::Guest;
use crate::kvm::{self, FLAG_INIT_SHARED, FLAG_MMAP, FLAG_NO_PIN, Kind, Vcpu, Vm};
use crate::memory::{Mapping, PAGE};

/// The guest's program.
const FILE: &str = "/root/guest.bin";

/// Bytes of memory for the program and the blocks of the vCPUs.
const IMAGE_SIZE: usize = 2 << 20;

/// Offset of the blocks in it.
const BLOCKS: usize = 1 << 20;

/// Guest address where cases put memory.
pub(crate) const MEMORY: u64 = 0x9000_0000;

/// Slot of the program.
pub(crate) const IMAGE_SLOT: u32 = 0;

/// Slot of the memory.
pub(crate) const MEMORY_SLOT: u32 = 1;

/// What backs the memory of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Anonymous memory of this process.
    Anonymous,
    /// A guest_memfd.
    Memfd,
    /// One that nobody can pin.
    NoPin,
}

/// What a machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    kind: Kind,
    vcpus: u64,
    pages: usize,
    backing: Backing,
    gic: bool,
}

impl Plan {
    /// One vCPU, no interrupt controller, and so many pages at [`MEMORY`]: in a guest_memfd if the VM is protected.
    pub(crate) fn new(kind: Kind, pages: usize) -> Self {
        let backing = if kind.is_protected() { Backing::Memfd } else { Backing::Anonymous };
        Self { kind, vcpus: 1, pages, backing, gic: true }
    }

    /// With more vCPUs.
    pub(crate) fn vcpus(self, vcpus: u64) -> Self {
        Self { vcpus, ..self }
    }

    /// With another backing.
    pub(crate) fn backing(self, backing: Backing) -> Self {
        Self { backing, ..self }
    }

    /// Makes the machine. It does not run yet.
    pub(crate) fn build(self) -> Outcome<Machine> {
        Machine::new(self)
    }
}

/// Memory of a machine: where this process sees it, and its file.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) mapping: Mapping,
    pub(crate) file: Option<OwnedFd>,
}

impl Memory {
    fn new(vm: &Vm, backing: Backing, size: usize) -> Outcome<Self> {
        if backing == Backing::Anonymous {
            return Ok(Self { mapping: works("mmap", Mapping::anonymous(size))?, file: None });
        }
        let file = if backing == Backing::NoPin {
            works("guest_memfd that nobody can pin", vm.memfd(size as u64, FLAG_MMAP | FLAG_INIT_SHARED | FLAG_NO_PIN))?
        } else {
            vm.shared_memfd(size)?
        };
        let mapping = works("mmap of guest_memfd", Mapping::shared(&file, size))?;
        Ok(Self { mapping, file: Some(file) })
    }

    /// Makes it a slot.
    pub(crate) fn add(&self, vm: &Vm, slot: u32, gpa: u64) -> Outcome {
        let mapping = &self.mapping;
        let added = match &self.file {
            None => vm.add_anonymous(slot, gpa, mapping),
            Some(file) => {
                let mapped = Some(mapping.address() as u64);
                vm.bind_mapped(slot, gpa, mapping.size() as u64, file, 0, mapped)
            }
        };
        works(format_args!("slot {slot}"), added).map(drop)
    }

    /// Its file, if it has one.
    pub(crate) fn file(&self) -> Outcome<&OwnedFd> {
        self.file.as_ref().context("the memory has no file")
    }
}

/// A VM with the guest's program in it.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) memory: Memory,
    pub(crate) image: Memory,
    pub(crate) gic: Option<OwnedFd>,
    pub(crate) vm: Vm,
}

impl Machine {
    fn new(plan: Plan) -> Outcome<Self> {
        let vm = Vm::new(plan.kind)?;
        let image = Memory::new(&vm, plan.backing, IMAGE_SIZE)?;
        let memory = Memory::new(&vm, plan.backing, plan.pages.max(1) * PAGE)?;
        image.add(&vm, IMAGE_SLOT, IMAGE)?;
        memory.add(&vm, MEMORY_SLOT, MEMORY)?;
        let vcpus = (0..plan.vcpus).map(|index| vm.add_vcpu(index)).collect::<Outcome<Vec<_>>>()?;
        let gic = if plan.gic { Some(vm.add_gic()?) } else { None };
        let machine = Self { vcpus, memory, image, gic, vm };
        machine.load()?;
        Ok(machine)
    }

    /// Puts the program into the memory, and vCPU 0 to its start.
    pub(crate) fn load(&self) -> Outcome {
        let path = Path::new(FILE);
        let program = std::fs::read(path).with_context(|| path.display().to_string())?;
        anyhow::ensure!(program.len() <= BLOCKS, "{} is too large", path.display());
        self.image.mapping.write(0, &program)?;
        for vcpu in &self.vcpus {
            let block = BLOCKS + usize::try_from(vcpu.index * BLOCK_SIZE)?;
            // Before the guest runs, a page that nobody has touched is not part of what is given to it.
            for page in (0..usize::try_from(BLOCK_SIZE)?).step_by(PAGE) {
                self.image.mapping.set(block + page, 0)?;
            }
            self.image.mapping.set(block, self.vm.kind.shared(DEVICE))?;
        }
        works("setting the PC", self.vcpus[0].set_register(kvm::PC, IMAGE))?;
        works("setting x0", self.vcpus[0].set_register(kvm::x(0), block_of(0)))?;
        Ok(())
    }

    /// A vCPU, to be told what to do. There may be only one for each vCPU at a time.
    pub(crate) fn guest(&self, index: usize) -> Guest<'_> {
        Guest::new(&self.vcpus[index], self.vm.kind)
    }

    /// vCPU 0, which has run until it waits for a command: what the guest gets before it runs is settled.
    pub(crate) fn boot(&self) -> Outcome<Guest<'_>> {
        let mut guest = self.guest(0);
        guest.start().context("boot of the guest")?;
        Ok(guest)
    }
}

/// Guest address of the block of a vCPU.
pub(crate) fn block_of(vcpu: u64) -> u64 {
    IMAGE + BLOCKS as u64 + vcpu * BLOCK_SIZE
}
