//! The committed counts, which a change must not exceed by much.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Where they are. `cargo xtask bench --check --json FILE` writes what the present state has.
pub(super) const FILE: &str = "tests/bench/baseline.json";

/// How much more, or less, of a count is worth mentioning, in percent.
const TOLERANCE: f64 = 5.0;

/// Numbers by the first part of their names and the last one.
pub(super) type Rows = BTreeMap<String, BTreeMap<String, f64>>;

pub(super) fn load(path: &Path) -> Result<Rows> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// Writes numbers as one JSON object, a row on each line.
pub(super) fn save(path: &Path, rows: &Rows) -> Result<()> {
    fs::write(path, json(rows)?).with_context(|| format!("cannot write {}", path.display()))
}

fn json(rows: &Rows) -> Result<String> {
    let lines = rows.iter().map(|(row, columns)| Ok(format!("  {row:?}: {}", serde_json::to_string(columns)?)));
    Ok(format!("{{\n{}\n}}\n", lines.collect::<Result<Vec<_>>>()?.join(",\n")))
}

/// Compares counts with those of the baseline and says how many there are.
///
/// # Errors
///
/// Counts that have grown, and names that only one of both has.
pub(super) fn compare(baseline: &Rows, counts: &Rows) -> Result<String> {
    let (old, new) = (flat(baseline), flat(counts));
    let mut complaints = Vec::new();
    let mut smaller = 0;
    for (name, &value) in &new {
        match old.get(name) {
            None => complaints.push(format!("{name} is not in {FILE}")),
            Some(&before) if value > before * (1.0 + TOLERANCE / 100.0) => {
                complaints.push(format!("{name} has grown from {before} to {value}"));
            }
            Some(&before) => smaller += usize::from(value < before * (1.0 - TOLERANCE / 100.0)),
        }
    }
    complaints.extend(old.keys().filter(|name| !new.contains_key(*name)).map(|name| format!("{name} is not counted")));
    if !complaints.is_empty() {
        bail!("{} of {} counts:\n{}", complaints.len(), new.len(), complaints.join("\n"));
    }
    Ok(format!("{} counts, {smaller} of them smaller than in {FILE} by more than {TOLERANCE} %", new.len()))
}

fn flat(rows: &Rows) -> BTreeMap<String, f64> {
    let names = rows
        .iter()
        .flat_map(|(row, columns)| columns.iter().map(move |(column, value)| (format!("{row}.{column}"), *value)));
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(columns: &[(&str, f64)]) -> Rows {
        let columns = columns.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        [("call.SHARE".to_owned(), columns)].into()
    }

    #[test]
    fn a_row_is_a_line() {
        let mut both = rows(&[("tlbi", 1.5), ("instructions", 1.0)]);
        both.extend([("start".to_owned(), Default::default())]);
        let text = json(&both).unwrap();
        assert_eq!(text, "{\n  \"call.SHARE\": {\"instructions\":1.0,\"tlbi\":1.5},\n  \"start\": {}\n}\n");
        assert_eq!(serde_json::from_str::<Rows>(&text).unwrap(), both);
    }

    #[test]
    fn a_count_may_not_grow() {
        let old = rows(&[("instructions", 100.0), ("tlbi", 0.0)]);
        assert!(compare(&old, &rows(&[("instructions", 105.0), ("tlbi", 0.0)])).unwrap().starts_with("2 counts, 0 of"));
        assert!(compare(&old, &rows(&[("instructions", 94.0), ("tlbi", 0.0)])).unwrap().starts_with("2 counts, 1 of"));
        let grown = compare(&old, &rows(&[("instructions", 106.0), ("tlbi", 1.0)])).unwrap_err().to_string();
        assert!(grown.contains("call.SHARE.instructions has grown from 100 to 106"), "{grown}");
        assert!(grown.contains("call.SHARE.tlbi has grown from 0 to 1"), "{grown}");
    }

    #[test]
    fn both_have_the_same_names() {
        let (one, two) = (rows(&[("instructions", 1.0)]), rows(&[("instructions", 1.0), ("dsb", 0.0)]));
        assert!(compare(&one, &two).unwrap_err().to_string().contains("call.SHARE.dsb is not in"));
        assert!(compare(&two, &one).unwrap_err().to_string().contains("call.SHARE.dsb is not counted"));
    }
}
