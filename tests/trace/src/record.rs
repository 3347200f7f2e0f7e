//! Events as values.

/// Declares an enumeration whose variants have names in the text.
macro_rules! named {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$doc])* $variant,)+
        }

        impl $name {
            /// All of them, in the order of the declaration.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Returns the name in the text.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// Returns the one of this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.name() == name)
            }
        }
    };
}

named! {
    /// How a store is ordered after those before it.
    MemOrder {
        /// Not at all.
        Plain = "plain",
        /// Store-release.
        Release = "release",
    }
}

named! {
    /// What a checker cannot tell from tables and registers.
    Hint {
        /// The lock that guards the tables under a root.
        SetRootLock = "set_root_lock",
        /// A lock, the location, guards what translates some addresses in the trees whose lock it names with its low 12 bits clear:
        /// those from the value on, whose low 12 bits are the binary logarithm of how many there are.
        SetRegionLock = "set_region_lock",
        /// The root that a table page belongs to.
        SetOwnerRoot = "set_owner_root",
        /// A root is given up; the value is 0.
        ReleaseTable = "release_table",
    }
}

named! {
    /// Which accesses of whom a DSB waits for.
    Dsb {
        /// All, inner shareable.
        Ish = "ish",
        /// Stores, inner shareable.
        Ishst = "ishst",
        /// All, of this CPU.
        Nsh = "nsh",
        /// All, full system.
        Sy = "sy",
    }
}

named! {
    /// TLB maintenance operations (Arm ARM DDI 0487, C5.5).
    TlbiOp {
        /// Both stages of the current VMID, all CPUs.
        Vmalls12e1is = "vmalls12e1is",
        /// Both stages of the current VMID, this CPU.
        Vmalls12e1 = "vmalls12e1",
        /// Stage 1 of the current VMID, all CPUs.
        Vmalle1is = "vmalle1is",
        /// Stage 1 of the current VMID, this CPU.
        Vmalle1 = "vmalle1",
        /// Stage 2 of the current VMID for an intermediate physical address, all CPUs.
        Ipas2e1is = "ipas2e1is",
        /// The same for the last level only.
        Ipas2le1is = "ipas2le1is",
        /// The EL2 stage 1 for an address, all CPUs.
        Vae2is = "vae2is",
        /// The EL2 stage 1, all CPUs.
        Alle2is = "alle2is",
        /// The EL2 stage 1, this CPU.
        Alle2 = "alle2",
    }
}

impl TlbiOp {
    /// Returns whether it has an operand: the page number that it is for.
    #[must_use]
    pub const fn has_operand(self) -> bool {
        matches!(self, Self::Ipas2e1is | Self::Ipas2le1is | Self::Vae2is)
    }
}

named! {
    /// System registers that decide about translation.
    Sysreg {
        /// Root and VMID of stage 2.
        VttbrEl2 = "vttbr_el2",
        /// Root of the EL2 stage 1.
        Ttbr0El2 = "ttbr0_el2",
        /// Shape of stage 2.
        VtcrEl2 = "vtcr_el2",
        /// Shape of the EL2 stage 1.
        TcrEl2 = "tcr_el2",
        /// Memory types of the EL2 stage 1.
        MairEl2 = "mair_el2",
        /// Whether there is a stage 2, and traps.
        HcrEl2 = "hcr_el2",
        /// Whether there is an EL2 stage 1.
        SctlrEl2 = "sctlr_el2",
    }
}

/// A barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// DSB.
    Dsb(Dsb),
    /// ISB.
    Isb,
}

/// What a CPU has done. Addresses are physical, and below 2^48; sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Pages of tables were zeroed, before their first use.
    MemInit {
        /// The first page.
        address: u64,
        /// Their size.
        size: u64,
    },
    /// Pages are tables no more.
    MemFree {
        /// The first page.
        address: u64,
        /// Their size.
        size: u64,
    },
    /// What cannot be seen.
    Hint {
        /// What it is about.
        kind: Hint,
        /// The table or root.
        location: u64,
        /// The root or lock.
        value: u64,
    },
    /// A lock, named by an address, was taken.
    Lock(u64),
    /// It is about to be released.
    Unlock(u64),
    /// A descriptor was stored.
    MemWrite {
        /// Its order.
        order: MemOrder,
        /// The address of the descriptor.
        address: u64,
        /// The descriptor.
        value: u64,
    },
    /// A barrier was executed.
    Barrier(Barrier),
    /// TLB maintenance was executed. The operand is that of the register, 0 if the operation has none.
    Tlbi {
        /// The operation.
        op: TlbiOp,
        /// The operand.
        operand: u64,
    },
    /// A system register was written.
    SysregWrite {
        /// The register.
        register: Sysreg,
        /// Its new value.
        value: u64,
    },
}

impl Record {
    /// Returns the name of its kind in the text.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::MemInit { .. } => "mem-init",
            Self::MemFree { .. } => "mem-free",
            Self::Hint { .. } => "hint",
            Self::Lock(_) => "lock",
            Self::Unlock(_) => "unlock",
            Self::MemWrite { .. } => "mem-write",
            Self::Barrier(_) => "barrier",
            Self::Tlbi { .. } => "tlbi",
            Self::SysregWrite { .. } => "sysreg-write",
        }
    }
}
