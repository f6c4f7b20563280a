//! docs/volumes.md names every scheme and parameter, and no others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sheave_volumes::VolumeSpec;

/// The rows of the tables whose first column is `head`, each as its columns.
fn rows(page: &str, head: &str) -> Vec<Vec<String>> {
    let table = page.lines().skip_while(|line| !line.starts_with(&format!("| {head} |")));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// The texts between backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The parameters that a VOLUME of this kind takes, as the message about a wrong one lists them.
fn taken(example: &str) -> BTreeSet<String> {
    let joint = if example.contains('?') { '&' } else { '?' };
    let error = VolumeSpec::of_operator(&format!("{example}{joint}no-such-parameter")).unwrap_err();
    let error = error.to_string();
    let (_, known) = error.split_once("known here: ").unwrap_or_else(|| panic!("{error}"));
    let known = known.split(';').next().unwrap();
    known.split(", ").map(str::to_owned).collect()
}

#[test]
fn the_page_has_all_schemes_and_parameters() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("../../docs/volumes.md")).unwrap();
    let mut examples = BTreeMap::<String, Vec<String>>::new();
    let is_built = |row: &Vec<String>| cfg!(feature = "s3") || row[1] != "bucket";
    for row in rows(&page, "VOLUME").into_iter().filter(is_built) {
        examples.entry(row[1].clone()).or_default().extend(quoted(&row[0]));
    }
    for example in examples.values().flatten() {
        VolumeSpec::of_operator(example).unwrap();
    }
    let error = VolumeSpec::of_operator("no-such:scheme").unwrap_err().to_string();
    let (_, schemes) = error.split_once("known: ").unwrap();
    for scheme in schemes.split('.').next().unwrap().split(", ") {
        let is_named = examples
            .values()
            .flatten()
            .any(|example| example.strip_prefix(scheme).is_some_and(|rest| rest.starts_with(':')));
        assert!(
            is_named || (scheme == "s3" && !cfg!(feature = "s3")),
            "{scheme} is not on the page"
        );
    }
    let mut named = BTreeMap::<&str, BTreeSet<String>>::new();
    let parameters = rows(&page, "Parameter");
    for row in &parameters {
        let names = quoted(&row[0]).into_iter().map(|text| {
            text.split_once('=').unwrap_or_else(|| panic!("{text} has an example")).0.to_owned()
        });
        let names: Vec<_> = names.collect();
        for kind in examples.keys() {
            if row[1] == "all" || row[1].split(", ").any(|other| other == kind) {
                named.entry(kind).or_default().extend(names.iter().cloned());
            }
        }
    }
    for (kind, examples) in &examples {
        for example in examples {
            assert_eq!(named[&**kind], taken(example), "{kind}: the page, and {example}");
        }
    }
}
