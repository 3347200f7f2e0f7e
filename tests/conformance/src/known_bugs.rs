//! The table of known bugs in THREAT_MODEL.md names tests that there are.

use std::{collections::BTreeMap, fs, path::Path};

use ravelin_payload::TESTS;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Counts the names of the functions behind `#[test]` in all sources under `folder`.
fn add_tests(folder: &Path, names: &mut BTreeMap<String, usize>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            add_tests(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                if let Some(name) = line.strip_prefix("fn ").and_then(|rest| rest.split(['(', '<']).next()) {
                    if std::mem::take(&mut is_test) {
                        *names.entry(name.to_owned()).or_default() += 1;
                    }
                } else {
                    // Other attributes and comments may lie between.
                    is_test = line == "#[test]" || is_test && (line.starts_with('#') || line.starts_with("//"));
                }
            }
        }
    }
}

/// Returns the defects of the table and what it names as tests of each.
fn table(text: &str) -> Vec<(&str, Vec<&str>)> {
    let (_, section) = text.split_once("\n| defect | defence here | tests |\n|---|---|---|\n").expect("the table");
    let rows = section.lines().take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
        let [defect, _, tests] = cells[..] else { panic!("not three cells: {row}") };
        (defect, tests.split('`').skip(1).step_by(2).collect())
    })
    .collect()
}

#[test]
fn each_known_bug_has_tests_of_one_meaning() {
    let text = fs::read_to_string(Path::new(ROOT).join("THREAT_MODEL.md")).unwrap();
    let mut names = BTreeMap::new();
    for folder in ["hyp", "host-interface", "tests"] {
        add_tests(&Path::new(ROOT).join(folder), &mut names);
    }
    names.extend(TESTS.iter().map(|test| test.name).chain([crate::BROKEN]).map(|name| (name.to_owned(), 1)));
    let table = table(&text);
    assert!(table.len() > 30, "only {} rows", table.len());
    for (defect, tests) in table {
        assert!(!tests.is_empty(), "no test of: {defect}");
        for test in tests {
            let count = names.get(test).copied().unwrap_or_default();
            assert_eq!(count, 1, "tests {test}, of: {defect}");
        }
    }
}

#[test]
fn a_row_has_its_tests() {
    let text =
        "x\n| defect | defence here | tests |\n|---|---|---|\n| a `b` | c | `d.e`, `f` |\n| g | h | none |\n\n| i |";
    assert_eq!(table(text), [(" a `b`", vec!["d.e", "f"]), (" g", vec![])]);
}
