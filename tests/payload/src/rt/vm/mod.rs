//! VMs, from their host's side: their making and their end. [`Guest`] lets one of their vCPUs do things.
//!
//! ```ignore
//! let pages = Pages::new(8 << 20);
//! let vm = Vm::boot(&pages, VmKind::Pkvm, 1)?;
//! let page = vm.add(MEMORY, 1)?;
//! let mut guest = vm.guest(0);
//! guest.fill(MEMORY, 1, page, 7)?;
//! guest.share(MEMORY, 1)?;
//! vm.claim(MEMORY, 1)?;
//! check_eq!(memory::find_difference(page, 7), None, "what the guest wrote");
//! vm.finish()
//! ```

use core::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use ravelin_abi::{MAX_TAKE_BACK_PAGES, Status, VmAttributes, VmKind};
use ravelin_guest::{BLOCK_SIZE, DEVICE, IMAGE};
use spin::Mutex;

use crate::{
    rt::{
        exchange::{AREA_PAGES, Exchange, Vectors, Who},
        memory::{self, PAGE},
        platform::platform,
    },
    tests::{Failure, Outcome, check, check_eq},
};

mod calls;
pub(crate) mod code;
mod guest;
mod pages;

use calls::success;
pub(crate) use calls::{Sizes, call, refused, succeed};
pub(crate) use guest::{Conversion, Guest, Stop};
pub(crate) use pages::Pages;

/// Bits of guest addresses in the VMs of tests. In a realm the last one marks what is shared.
pub(crate) const IPA_BITS: u64 = 36;

/// Guest address of the blocks of the vCPUs, one behind the other.
pub(crate) const BLOCKS: u64 = IMAGE + (1 << 20);

/// Guest address where tests put memory.
pub(crate) const MEMORY: u64 = 0x9000_0000;

/// Guest address of the distributor.
pub(crate) const DISTRIBUTOR: u64 = 0x0800_0000;

/// Guest address of the redistributors.
pub(crate) const REDISTRIBUTORS: u64 = 0x080a_0000;

/// Pages that a VM gets for its tables when it is made: enough for the image and some memory.
const TABLES: u64 = 8;

/// Both ways to be protected.
pub(crate) const PROTECTED: [VmKind; 2] = [VmKind::Pkvm, VmKind::Realm];

/// A VM.
pub(crate) struct Vm<'a> {
    pub(crate) pages: &'a Pages,
    pub(crate) kind: VmKind,
    pub(crate) handle: u64,
    attributes: VmAttributes,
    run_pages: Mutex<ArrayVec<u64, 8>>,
    /// Guest addresses and lengths of what has been mapped.
    mapped: Mutex<ArrayVec<(u64, u64), 32>>,
    gone: AtomicBool,
}

impl<'a> Vm<'a> {
    /// Attributes of the VMs of tests.
    pub(crate) const fn attributes(kind: VmKind, vcpus: u64) -> VmAttributes {
        VmAttributes { kind, ipa_bits: IPA_BITS, vcpus }
    }

    /// Makes a VM that has nothing but some pages for tables.
    pub(crate) fn create(pages: &'a Pages, kind: VmKind, vcpus: u64) -> Result<Self, Failure> {
        Self::with(pages, Self::attributes(kind, vcpus))
    }

    /// Makes a VM with these attributes that has nothing but some pages for tables.
    pub(crate) fn with(pages: &'a Pages, attributes: VmAttributes) -> Result<Self, Failure> {
        let sizes = Sizes::of(attributes)?;
        let metadata = pages.take_aligned(sizes.vm, sizes.align)?;
        let handle = succeed("VM_CREATE", [attributes.bits(), metadata, sizes.vm])?;
        let vm = Self {
            pages,
            kind: attributes.kind,
            handle,
            attributes,
            run_pages: Mutex::new(ArrayVec::new()),
            mapped: Mutex::new(ArrayVec::new()),
            gone: AtomicBool::new(false),
        };
        vm.donate_tables(TABLES)?;
        Ok(vm)
    }

    /// Makes a VM with these vCPUs and the image of the guest, sealed. vCPU 0 starts when it is first run.
    pub(crate) fn boot(pages: &'a Pages, kind: VmKind, vcpus: u64) -> Result<Self, Failure> {
        let vm = Self::create(pages, kind, vcpus)?;
        vm.load()?;
        for _ in 0..vcpus {
            vm.add_vcpu()?;
        }
        vm.seal()?;
        Ok(vm)
    }

    /// Puts the image of the guest into the VM.
    pub(crate) fn load(&self) -> Outcome {
        let Some(image) = platform().initrd else {
            return Err(Failure::new(format_args!("there is no guest: it is the initrd")));
        };
        let count = image.size().div_ceil(PAGE);
        let start = self.pages.take(count)?;
        for offset in (0..image.size()).step_by(8) {
            memory::store(start + offset, memory::load(image.start + offset));
        }
        memory::publish_code();
        self.map(IMAGE, start, count)
    }

    /// Adds the next vCPU, with its block.
    pub(crate) fn add_vcpu(&self) -> Outcome {
        let index = self.run_pages.lock().len() as u64;
        let sizes = Sizes::of(self.attributes)?;
        let metadata = self.pages.take(sizes.vcpu)?;
        let run_page = self.pages.take(1)?;
        // Nothing that an earlier test left there is an answer.
        (0..PAGE).step_by(8).for_each(|offset| memory::store(run_page + offset, 0));
        succeed("VCPU_CREATE", [self.handle, index, metadata, sizes.vcpu, run_page])?;
        self.run_pages.lock().push(run_page);

        let block = self.pages.take(BLOCK_SIZE / PAGE)?;
        (0..BLOCK_SIZE).step_by(8).for_each(|offset| memory::store(block + offset, 0));
        memory::store(block, self.shared(DEVICE));
        self.map(block_of(index), block, BLOCK_SIZE / PAGE)
    }

    /// Seals it, with the image as what vCPU 0 starts.
    pub(crate) fn seal(&self) -> Outcome {
        succeed("VM_SEAL", self.seal_arguments()).map(drop)
    }

    /// The arguments of [`Vm::seal`].
    pub(crate) fn seal_arguments(&self) -> [u64; 5] {
        [self.handle, IMAGE, block_of(0), DISTRIBUTOR, REDISTRIBUTORS]
    }

    /// A vCPU, to be told what to do.
    pub(crate) fn guest(&self, index: u64) -> Guest<'_> {
        Guest::new(self, index)
    }

    /// The run page of a vCPU.
    pub(crate) fn run_page(&self, index: u64) -> u64 {
        self.run_pages.lock()[index as usize]
    }

    /// The address by which the guest accesses a device, or memory that it shares, that is at `address`.
    pub(crate) fn shared(&self, address: u64) -> u64 {
        address | self.shared_bit()
    }

    /// Gives the guest an area for an [`Exchange`], which its host may access too.
    pub(crate) fn add_area(&self, guest: &mut Guest<'_>, at: u64, vectors: Vectors) -> Result<Exchange, Failure> {
        let area = self.add(at, AREA_PAGES)?;
        guest.share(at, AREA_PAGES)?;
        self.claim(at, AREA_PAGES)?;
        Ok(Exchange::new(area, self.shared(at), Who::Guest, vectors))
    }

    /// The bit that marks such addresses, if there is one.
    pub(crate) fn shared_bit(&self) -> u64 {
        if self.kind == VmKind::Realm { 1 << (self.attributes.ipa_bits - 1) } else { 0 }
    }

    /// Donates pages for tables.
    pub(crate) fn donate_tables(&self, count: u64) -> Outcome {
        let tables = self.pages.take(count)?;
        succeed("VM_DONATE_TABLES", [self.handle, tables, count]).map(drop)
    }

    /// Makes a call until it does not lack pages for tables.
    fn with_tables<const N: usize>(&self, name: &str, arguments: [u64; N]) -> Result<u64, Failure> {
        for _ in 0..8 {
            match call(name, arguments) {
                (Status::NeedsTables, [missing, ..]) => {
                    check!((1..=512).contains(&missing), "{name} lacks {missing} pages for tables");
                    self.donate_tables(missing)?;
                }
                answer => return success(name, arguments, answer),
            }
        }
        Err(Failure::new(format_args!("{name} lacks pages for tables again and again")))
    }

    /// Puts pages into the VM, in as many calls as it takes.
    pub(crate) fn map(&self, at: u64, address: u64, count: u64) -> Outcome {
        let mut done = 0;
        while done < count {
            let some = (count - done).min(MAX_TAKE_BACK_PAGES);
            let offset = done * PAGE;
            self.with_tables("VM_MAP", [self.handle, at + offset, address + offset, some])?;
            done += some;
        }
        self.note(at, count);
        Ok(())
    }

    /// Remembers that there may be pages to reclaim.
    pub(crate) fn note(&self, at: u64, count: u64) {
        let mut mapped = self.mapped.lock();
        match mapped.last_mut() {
            Some((base, pages)) if *base + *pages * PAGE == at => *pages += count,
            _ => mapped.push((at, count)),
        }
    }

    /// Takes pages and puts them into the VM; returns where they are.
    pub(crate) fn add(&self, at: u64, count: u64) -> Result<u64, Failure> {
        let align = if count.is_multiple_of(512) { 512 } else { 1 };
        let address = self.pages.take_aligned(count, align)?;
        self.map(at, address, count)?;
        Ok(address)
    }

    /// Claims what the guest has offered.
    pub(crate) fn claim(&self, at: u64, count: u64) -> Outcome {
        succeed("CLAIM", [self.handle, at, count]).map(drop)
    }

    /// Releases what has been claimed.
    pub(crate) fn release(&self, at: u64, count: u64) -> Outcome {
        succeed("RELEASE", [self.handle, at, count]).map(drop)
    }

    /// Ends the VM, takes everything back, and checks that it is the host's.
    pub(crate) fn finish(self) -> Outcome {
        self.end()?;
        self.pages.are_owned()
    }

    /// Ends the VM and takes everything back.
    pub(crate) fn end(&self) -> Outcome {
        self.gone.store(true, Ordering::Relaxed);
        succeed("VM_TEARDOWN", [self.handle])?;
        self.reclaim()?;
        self.destroy()
    }

    /// Reclaims the memory of the VM, which is dying.
    pub(crate) fn reclaim(&self) -> Outcome {
        let mapped = self.mapped.lock().clone();
        for (at, count) in mapped {
            let mut done = 0;
            while done < count {
                let some = self.with_tables("VM_RECLAIM", [self.handle, at + done * PAGE, count - done])?;
                check!(some != 0 && some <= count - done, "VM_RECLAIM of {} pages did {some}", count - done);
                done += some;
            }
        }
        Ok(())
    }

    /// Destroys the VM, which is dying and has no memory.
    pub(crate) fn destroy(&self) -> Outcome {
        self.gone.store(true, Ordering::Relaxed);
        let mut left = u64::MAX;
        while left != 0 {
            let now = succeed("VM_DESTROY", [self.handle])?;
            check!(now < left, "VM_DESTROY leaves {now} pages after it left {left}");
            left = now;
        }
        check_eq!(call("VM_DESTROY", [self.handle]).0, Status::BadHandle, "VM_DESTROY of what is gone");
        Ok(())
    }
}

impl Drop for Vm<'_> {
    /// After a failure, so that other tests find their memory.
    fn drop(&mut self) {
        if !self.gone.load(Ordering::Relaxed) {
            let _ = call("VM_TEARDOWN", [self.handle]);
            let _ = self.reclaim();
            let _ = self.destroy();
        }
    }
}

/// Guest address of the block of a vCPU.
pub(crate) fn block_of(vcpu: u64) -> u64 {
    BLOCKS + vcpu * BLOCK_SIZE
}
