//! How counts grow with the size of a range, with the number of VMs, and with RAM.

use std::collections::BTreeMap;

use anyhow::Result;

use super::baseline::Rows;
use super::plot::{Plot, Series};
use super::report::{Report, digits};
use super::{Bench, MEMORY};

/// The payload's tests that measure ranges of many sizes, and with many VMs around.
const TESTS: [(&str, &str); 2] = [("ranges", "bench.ranges"), ("vms", "bench.vms")];

impl Bench {
    /// Counts what grows. What is done twice counts when it is done again.
    pub(super) fn growth(&self, report: &mut Report) -> Result<()> {
        report.end();
        for (group, test) in TESTS {
            let calls = self.twice(test)?.calls;
            report.line(format_args!("\n{test:<32}{:>8}{:>16}{:>10}{:>10}", "number", "EL2", "entries", "tlbi"));
            for call in calls.iter().filter(|call| call.again) {
                let columns = call.counts.columns(2..=2);
                let [instructions, entries, tlbi] =
                    ["instructions", "entries", "tlbi"].map(|name| digits(columns[name]));
                let (name, number) = (&call.name, call.pages);
                report.line(format_args!("  {name:<30}{number:>8}{instructions:>16}{entries:>10}{tlbi:>10}"));
                for (column, count) in columns.into_iter().filter(|(_, count)| *count > 0.0) {
                    report.add(format!("growth.{group}.{name}.{number}.{column}"), count);
                }
            }
        }
        report.printed_already();
        Ok(())
    }
}

/// The plots of what there are numbers for, with the names of their files.
pub(super) fn plots(rows: &Rows) -> Vec<(&'static str, Plot)> {
    let lines = |column, names: &[(&str, &str)]| {
        names.iter().map(|(name, row)| Series::new(*name, against(rows, row, column))).collect::<Vec<_>>()
    };
    let ranges = |title: &str, column, y_label: &str, names: &[(&str, &str)]| Plot {
        title: title.into(),
        x_label: "pages".into(),
        y_label: y_label.into(),
        series: lines(column, names),
        crossovers: false,
    };
    let pkvm = |name: &str, row: &str| Series::new(name, against(rows, row, "pkvm-el2")).dashed();

    let host = ranges(
        "Calls of the host",
        "instructions",
        INSTRUCTIONS,
        &[
            ("SHARE", "growth.ranges.SHARE"),
            ("UNSHARE", "growth.ranges.UNSHARE"),
            ("DONATE", "growth.ranges.DONATE"),
            ("TAKE_BACK", "growth.ranges.TAKE_BACK"),
            ("first touch", "growth.ranges.touch"),
        ],
    );
    let mut share = ranges(
        "A guest shares memory, and the host is told",
        "instructions",
        INSTRUCTIONS,
        &[
            ("pages", "growth.ranges.pkvm.share"),
            ("blocks", "growth.ranges.pkvm.share-blocks"),
            ("realm, pages", "growth.ranges.realm.share"),
            ("realm, blocks", "growth.ranges.realm.share-blocks"),
        ],
    );
    share.series.push(pkvm("pKVM", "side-by-side.share"));
    share.crossovers = true;
    let mut unshare = ranges(
        "A guest takes memory back",
        "instructions",
        INSTRUCTIONS,
        &[
            ("pages", "growth.ranges.pkvm.unshare"),
            ("blocks", "growth.ranges.pkvm.unshare-blocks"),
            ("realm, pages", "growth.ranges.realm.unshare"),
            ("realm, blocks", "growth.ranges.realm.unshare-blocks"),
        ],
    );
    unshare.series.push(pkvm("pKVM", "side-by-side.unshare"));
    let claims = ranges(
        "The host claims and releases what a guest shares",
        "instructions",
        INSTRUCTIONS,
        &[
            ("claim, pages", "growth.ranges.pkvm.claim"),
            ("claim, blocks", "growth.ranges.pkvm.claim-blocks"),
            ("release, pages", "growth.ranges.pkvm.release"),
            ("release, blocks", "growth.ranges.pkvm.release-blocks"),
        ],
    );
    let mut touch = ranges(
        "A guest's first touch: fault, VM_MAP, resumption",
        "instructions",
        INSTRUCTIONS,
        &[("pages", "growth.ranges.pkvm.touch"), ("blocks", "growth.ranges.pkvm.touch-blocks")],
    );
    touch.series.push(pkvm("pKVM", "side-by-side.touch"));
    touch.crossovers = true;
    let mut tlbi = ranges(
        "TLB invalidations",
        "tlbi",
        "TLBI at EL2",
        &[
            ("DONATE", "growth.ranges.DONATE"),
            ("TAKE_BACK", "growth.ranges.TAKE_BACK"),
            ("release, pages", "growth.ranges.pkvm.release"),
            ("release, blocks", "growth.ranges.pkvm.release-blocks"),
            ("realm share, pages", "growth.ranges.realm.share"),
            ("realm share, blocks", "growth.ranges.realm.share-blocks"),
        ],
    );
    tlbi.series.push(Series::new("pKVM: unshare", against(rows, "side-by-side.unshare", "pkvm-tlbi")).dashed());
    let vms = Plot {
        x_label: "VMs".into(),
        ..ranges(
            "With this many VMs",
            "instructions",
            INSTRUCTIONS,
            &[
                ("VM started", "growth.vms.pkvm.start"),
                ("VM destroyed", "growth.vms.pkvm.destroy"),
                ("first touch of a page", "growth.vms.pkvm.touch"),
                ("VM created", "growth.vms.pkvm.create"),
                ("share", "growth.vms.pkvm.share"),
                ("release", "growth.vms.pkvm.release"),
                ("MMIO exit", "growth.vms.pkvm.mmio-load"),
                ("claim", "growth.vms.pkvm.claim"),
                ("unshare", "growth.vms.pkvm.unshare"),
                ("SHARE of the host", "growth.vms.SHARE"),
                ("empty call", "growth.vms.pkvm.call"),
            ],
        )
    };
    let against_ram = |title: &str, y_label: &str, row| Plot {
        title: title.into(),
        x_label: "RAM, MiB".into(),
        y_label: y_label.into(),
        series: vec![Series::new("Ravelin", by_ram(rows, row))],
        crossovers: false,
    };
    let boot = against_ram("Start-up of the first CPU", INSTRUCTIONS, "start");
    let mut carve_out = against_ram("Carve-out", "MiB", "carve-out");
    let drawn = rows.contains_key("carve-out");
    let of_pkvm = MEMORY.iter().filter(|_| drawn).filter_map(|(size, carve_out)| Some((*size as f64, (*carve_out)?)));
    carve_out.series.push(Series::new("pKVM", of_pkvm).dashed());
    vec![
        ("host", host),
        ("share", share),
        ("unshare", unshare),
        ("claim", claims),
        ("touch", touch),
        ("tlbi", tlbi),
        ("vms", vms),
        ("boot", boot),
        ("carve-out", carve_out),
    ]
}

const INSTRUCTIONS: &str = "EL2 instructions";

/// The points of a line: what rows `ROW.NUMBER` say in a column.
fn against(rows: &Rows, row: &str, column: &str) -> Vec<(f64, f64)> {
    let of = |name: &str| name.strip_prefix(row)?.strip_prefix('.')?.parse().ok();
    rows.iter().filter_map(|(name, columns)| Some((of(name)?, *columns.get(column)?))).collect()
}

/// The same for columns that are sizes of RAM in MiB.
fn by_ram(rows: &Rows, row: &str) -> Vec<(f64, f64)> {
    let columns = rows.get(row).into_iter().flat_map(BTreeMap::iter);
    columns.filter_map(|(size, value)| Some((size.strip_suffix('M')?.parse().ok()?, *value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_of_the_rows_with_a_number() {
        let columns = |name: &str, value| BTreeMap::from([(name.to_owned(), value)]);
        let rows = Rows::from([
            ("growth.share.1".to_owned(), columns("tlbi", 2.0)),
            ("growth.share.16".to_owned(), columns("tlbi", 17.0)),
            ("growth.share.64".to_owned(), columns("entries", 1.0)),
            ("growth.share-blocks.512".to_owned(), columns("tlbi", 3.0)),
            ("start".to_owned(), BTreeMap::from([("2048M".to_owned(), 5.0), ("growth-per-GiB".to_owned(), 6.0)])),
        ]);
        assert_eq!(against(&rows, "growth.share", "tlbi"), [(1.0, 2.0), (16.0, 17.0)]);
        assert_eq!(by_ram(&rows, "start"), [(2048.0, 5.0)]);
    }
}
