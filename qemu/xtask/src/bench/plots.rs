//! The plots of the documentation, and the numbers in them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::baseline::{self, Rows};
use super::plot::Plot;
use super::{growth, schemes};

/// The file with the numbers that are drawn, beside the plots.
const NUMBERS: &str = "numbers.json";

/// How the names of rows begin that are drawn.
const DRAWN: [&str; 5] = ["start", "carve-out", "growth.", "side-by-side.", "scheme."];

/// Draws what there are numbers for.
pub(super) fn write(dir: &Path, rows: &Rows) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let drawn = rows.iter().filter(|(row, _)| DRAWN.iter().any(|prefix| row.starts_with(prefix)));
    baseline::save(&dir.join(NUMBERS), &drawn.map(|(row, columns)| (row.clone(), columns.clone())).collect())?;
    for (name, plot) in all(rows) {
        let path = dir.join(name).with_extension("svg");
        fs::write(&path, plot.svg()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The plots that have points, with the names of their files.
fn all(rows: &Rows) -> Vec<(&'static str, Plot)> {
    let mut plots = [growth::plots(rows), schemes::plots(rows)].concat();
    plots.retain(|(_, plot)| plot.has_points());
    plots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn the_committed_plots_are_of_the_committed_numbers() {
        let dir = workspace::root().join("docs/plots");
        let plots = all(&baseline::load(&dir.join(NUMBERS)).unwrap());
        assert!(!plots.is_empty());
        for (name, plot) in &plots {
            let committed = fs::read_to_string(dir.join(name).with_extension("svg")).unwrap();
            assert!(
                committed == plot.svg().unwrap(),
                "{name}: cargo xtask bench --from docs/plots/{NUMBERS} --plots docs/plots"
            );
        }
        let files = fs::read_dir(&dir).unwrap();
        assert_eq!(files.count(), plots.len() + 1, "docs/plots has what is not drawn any more");
    }
}
