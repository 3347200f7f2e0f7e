//! The devices and the firmware interface that Ravelin itself uses.

use arrayvec::ArrayVec;
use dtoolkit::fdt::Fdt;
use ravelin_memory::PhysRange;

use crate::{
    DtbError, Fault,
    cells::{as_string, cell, is_compatible, string, value},
    memory::child,
    path::Path,
};

/// Regions of redistributors that Ravelin has room for.
pub const MAX_REDISTRIBUTOR_REGIONS: usize = 8;

/// Bytes of the redistributor of one CPU, without what GICv4 adds (Arm IHI 0069, section 12.10).
const REDISTRIBUTOR_SIZE: u64 = 128 << 10;

/// Where the GICv3 is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gic {
    /// The distributor's registers.
    pub distributor: PhysRange,
    /// The redistributors' registers, in the order of the device tree.
    pub redistributors: ArrayVec<PhysRange, MAX_REDISTRIBUTOR_REGIONS>,
}

/// The instruction by which firmware is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// SMC: firmware is at EL3.
    Smc,
    /// HVC: firmware is at EL2.
    Hvc,
}

/// Returns the registers of the console's PL011: the one that `stdout-path` names, else the first.
pub(crate) fn uart(fdt: Fdt<'_>, ram: &[PhysRange]) -> Result<PhysRange, DtbError> {
    let is_pl011 = |node| is_compatible(node, &["arm,pl011"]);
    let path = stdout(fdt)
        .filter(|path| path.node().is_some_and(is_pl011))
        .or_else(|| Path::search(fdt, &is_pl011))
        .ok_or_else(|| Fault::Missing("node compatible with arm,pl011").at(["/"]))?;
    path.registers(ram)?.next().unwrap_or_else(|| Err(path.blame(Fault::Missing("registers"))))
}

/// Follows `stdout-path`, which is a path or an alias, with options behind a colon.
fn stdout(fdt: Fdt<'_>) -> Option<Path<'_>> {
    let root = fdt.root();
    let stdout = string(child(root, "chosen")?, "stdout-path").ok()??.split(':').next()?;
    if stdout.starts_with('/') {
        return Path::find(fdt, stdout);
    }
    let aliases = child(root, "aliases")?;
    Path::find(fdt, as_string(value(aliases, stdout)?)?)
}

/// Returns where the GICv3 is, if there is one with a redistributor for each of `cpus` CPUs.
pub(crate) fn gic(fdt: Fdt<'_>, ram: &[PhysRange], cpus: usize) -> Result<Gic, DtbError> {
    const GIC_V2: [&str; 4] = ["arm,gic-400", "arm,cortex-a15-gic", "arm,cortex-a7-gic", "arm,cortex-a9-gic"];
    let Some(path) = Path::search(fdt, &|node| is_compatible(node, &["arm,gic-v3"])) else {
        return Err(match Path::search(fdt, &|node| is_compatible(node, &GIC_V2)) {
            Some(path) => path.blame(Fault::Unsupported("this is a GICv2, and Ravelin needs a GICv3")),
            None => Fault::Missing("interrupt controller compatible with arm,gic-v3").at(["/"]),
        });
    };
    let regions = path.node().map_or(Ok(None), |node| cell(node, "#redistributor-regions"));
    let regions = regions.map_err(|fault| path.blame(fault))?.unwrap_or(1);
    let regions = usize::try_from(regions).unwrap_or(usize::MAX);
    if regions > MAX_REDISTRIBUTOR_REGIONS {
        return Err(path.blame(Fault::TooMany { what: "redistributor regions", limit: MAX_REDISTRIBUTOR_REGIONS }));
    }
    // What follows are the registers for GICv2 guests.
    let mut reg = path.registers(ram)?;
    let distributor = reg.next().unwrap_or_else(|| Err(path.blame(Fault::Missing("distributor"))))?;
    let redistributors = reg.take(regions).collect::<Result<ArrayVec<_, MAX_REDISTRIBUTOR_REGIONS>, _>>()?;
    if redistributors.len() != regions {
        return Err(path.blame(Fault::Malformed("#redistributor-regions (reg has fewer)")));
    }
    let capacity = redistributors
        .iter()
        .filter_map(|region| region.size().checked_div(REDISTRIBUTOR_SIZE))
        .fold(0, u64::saturating_add);
    if u64::try_from(cpus).is_ok_and(|cpus| cpus > capacity) {
        return Err(path.blame(Fault::Missing("redistributor for every CPU")));
    }
    for (index, region) in redistributors.iter().enumerate() {
        let before = core::iter::once(&distributor).chain(redistributors.iter().take(index));
        if let Some(other) = before.into_iter().find(|other| other.overlaps(region)) {
            return Err(path.blame(Fault::Overlap {
                range: *region,
                what: "registers of the same GIC",
                other: *other,
            }));
        }
    }
    Ok(Gic { distributor, redistributors })
}

/// Returns how PSCI is called.
pub(crate) fn psci(fdt: Fdt<'_>) -> Result<Conduit, DtbError> {
    let Some(path) = Path::search(fdt, &|node| is_compatible(node, &["arm,psci-1.0", "arm,psci-0.2"])) else {
        return Err(match Path::search(fdt, &|node| is_compatible(node, &["arm,psci"])) {
            Some(path) => path.blame(Fault::Unsupported("this is PSCI 0.1, and Ravelin needs 0.2 or later")),
            None => Fault::Missing("firmware compatible with arm,psci-1.0 or arm,psci-0.2").at(["/"]),
        });
    };
    match path.node().map_or(Ok(None), |node| string(node, "method")).map_err(|fault| path.blame(fault))? {
        Some("smc") => Ok(Conduit::Smc),
        Some("hvc") => Ok(Conduit::Hvc),
        Some(_) => Err(path.blame(Fault::Malformed("method"))),
        None => Err(path.blame(Fault::Missing("property method"))),
    }
}
