//! How counts grow.

use super::MEMORY;
use super::baseline::Rows;
use super::plot::{Plot, Series};

/// The plots of what there are numbers for, with the names of their files.
pub(super) fn plots(rows: &Rows) -> Vec<(&'static str, Plot)> {
    let against_ram = |row: &str| {
        let sizes = rows.get(row).into_iter().flatten();
        let points = sizes.filter_map(|(size, value)| Some((size.strip_suffix('M')?.parse::<f64>().ok()?, *value)));
        Series::new("Ravelin", points)
    };
    let pkvm = MEMORY.iter().filter_map(|(size, carve_out)| Some((*size as f64, (*carve_out)?)));
    let plot = |title: &str, y_label: &str, series| Plot {
        title: title.into(),
        x_label: "RAM, MiB".into(),
        y_label: y_label.into(),
        series,
        crossovers: false,
    };
    vec![
        ("boot", plot("Start-up of the first CPU", "EL2 instructions", vec![against_ram("start")])),
        ("carve-out", plot("Carve-out", "MiB", vec![against_ram("carve-out"), Series::new("pKVM", pkvm).dashed()])),
    ]
}
