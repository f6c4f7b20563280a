//! Which crates may import which, and how many the data path may pull in (see ARCHITECTURE.md).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use sheave_tests::Run;

/// Crates of the workspace, and what each may import. Nothing else may be imported.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("sheave-core", &[]),
    ("sheave-proto", &["sheave-core"]),
    ("sheave-tls", &["sheave-core", "sheave-proto"]),
    ("sheave-ring", &["sheave-core"]),
    ("sheave-telemetry", &["sheave-core"]),
    ("sheave-shard", &["sheave-core", "sheave-ring", "sheave-telemetry"]),
    (
        "sheave-nbd",
        &[
            "sheave-core",
            "sheave-proto",
            "sheave-ring",
            "sheave-shard",
            "sheave-telemetry",
            "sheave-tls",
        ],
    ),
    ("sheave-knbd", &["sheave-core", "sheave-proto"]),
    ("sheave-ublk", &["sheave-core", "sheave-ring", "sheave-telemetry", "sheave-shard"]),
    (
        "sheave-daemon",
        &[
            "sheave-core",
            "sheave-durable",
            "sheave-knbd",
            "sheave-layers",
            "sheave-local",
            "sheave-nbd",
            "sheave-proto",
            "sheave-shard",
            "sheave-telemetry",
            "sheave-ublk",
            "sheave-volumes",
        ],
    ),
    ("sheave-durable", &["sheave-core"]),
    ("sheave-control", &[]),
    ("sheave-csi-proto", &[]),
    ("sheave-client", &["sheave-control", "sheave-node"]),
    (
        "sheave-csi",
        &["sheave-client", "sheave-control", "sheave-core", "sheave-csi-proto", "sheave-node"],
    ),
    ("sheave-docker", &["sheave-client", "sheave-core", "sheave-durable", "sheave-node"]),
    ("sheave-flexvolume", &["sheave-client", "sheave-core", "sheave-node"]),
    ("sheave-node", &["sheave-core", "sheave-durable"]),
    ("sheave-local", &["sheave-core", "sheave-ring"]),
    ("sheave-layers", &["sheave-core"]),
    ("sheave-remote", &["sheave-core", "sheave-proto", "sheave-tls"]),
    ("sheave-exec", &["sheave-core", "sheave-local"]),
    ("sheave-object", &["sheave-core", "sheave-durable"]),
    ("sheave-s3", &["sheave-core", "sheave-object"]),
    // For tests only.
    ("sheave-conformance", &["sheave-core", "sheave-layers"]),
    ("sheave-emulator", &[]),
    ("sheave-pools", &["sheave-core", "sheave-durable", "sheave-volumes"]),
    (
        "sheave-volumes",
        &[
            "sheave-core",
            "sheave-exec",
            "sheave-layers",
            "sheave-local",
            "sheave-object",
            "sheave-proto",
            "sheave-remote",
            "sheave-s3",
        ],
    ),
];

/// These wire the others together, and nothing imports them but the binary `sheave`.
const IMPORT_ANYTHING: &[&str] = &["sheave", "sheave-bench", "sheave-tests"];

/// The data path builds without an S3 client and without gRPC.
const DATA_PATH_CRATES_MAX: usize = 60;
const NOT_IN_DATA_PATH: &[&str] = &["aws-", "tonic", "prost", "hyper", "axum", "clap", "ratatui"];

#[test]
fn imports_follow_the_layout() {
    let allowed: BTreeMap<_, _> = MAY_IMPORT.iter().copied().collect();
    let mut wrong = Vec::new();
    for (name, imports) in workspace() {
        if IMPORT_ANYTHING.contains(&name.as_str()) {
            let upward = ["sheave", "sheave-tests"].iter().find(|&&top| imports.contains(top));
            wrong.extend(upward.map(|top| format!("{name} -> {top}")));
            continue;
        }
        let Some(allowed) = allowed.get(name.as_str()) else {
            panic!("crate {name} has no place in the layout: give it one here and in the document");
        };
        let extra = imports.iter().filter(|import| !allowed.contains(&import.as_str()));
        wrong.extend(extra.map(|import| format!("{name} -> {import}")));
    }
    assert!(wrong.is_empty(), "imports against the layout: {wrong:?}");
}

#[test]
fn the_layout_names_only_crates_that_exist() {
    let workspace = workspace();
    let known = MAY_IMPORT.iter().map(|(name, _)| name).chain(IMPORT_ANYTHING);
    let gone: Vec<_> = known.filter(|&&name| !workspace.contains_key(name)).collect();
    assert!(gone.is_empty(), "no such crates: {gone:?}");
}

#[test]
fn the_data_path_stays_small() {
    let tree = cargo("tree --package sheave-nbd --edges normal,build --prefix none --no-dedupe");
    let crates: BTreeSet<_> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| !name.starts_with("sheave-"))
        .collect();
    assert!(crates.contains("io-uring"), "the tree of the data path has a ring:\n{tree}");
    assert!(
        crates.len() < DATA_PATH_CRATES_MAX,
        "the data path pulls in {} crates: {crates:?}",
        crates.len()
    );
    let banned: Vec<_> = crates
        .iter()
        .filter(|name| NOT_IN_DATA_PATH.iter().any(|banned| name.starts_with(banned)))
        // The cryptography of rustls shares a prefix with the S3 client.
        .filter(|&&name| !matches!(name, "aws-lc-rs" | "aws-lc-sys"))
        .collect();
    assert!(banned.is_empty(), "not for the data path: {banned:?}");
}

/// Each crate of the workspace with the crates of the workspace that it imports.
fn workspace() -> BTreeMap<String, BTreeSet<String>> {
    let metadata: Value =
        serde_json::from_str(&cargo("metadata --no-deps --format-version 1")).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &Value| value["name"].as_str().expect("name").to_owned();
    let known: BTreeSet<_> = packages.iter().map(name).collect();
    let imports = |package: &Value| {
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        // Tests may import anything.
        let shipped = dependencies.iter().filter(|dependency| dependency["kind"] != "dev");
        shipped.map(name).filter(|import| known.contains(import)).collect()
    };
    packages.iter().map(|package| (name(package), imports(package))).collect()
}

fn cargo(args: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("workspace");
    Run::new(env!("CARGO")).args(args).args("--offline --locked").in_dir(root).ok()
}

/// The data path's loop is read module by module, so no module needs one that needs it.
#[test]
fn the_modules_of_the_shard_have_no_circle() {
    let mut left = modules_of_shard();
    assert!(left["shard"].contains("volumes"), "{left:?}");
    // Takes away what needs nothing that is left, as long as there is any.
    loop {
        let is_free = |needs: &BTreeSet<String>| !needs.iter().any(|need| left.contains_key(need));
        let free: Vec<_> =
            left.iter().filter(|(_, needs)| is_free(needs)).map(|(name, _)| name.clone()).collect();
        if free.is_empty() {
            break;
        }
        left.retain(|name, _| !free.contains(name));
    }
    assert!(left.is_empty(), "modules that need each other, or what does: {left:?}");
}

/// Each module of the crate `sheave-shard` with the modules that its code, but not its tests, uses.
fn modules_of_shard() -> BTreeMap<String, BTreeSet<String>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../datapath/shard/src");
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).expect("a source file");
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let lib = read("lib.rs");
    // Where a name comes from that the crate's root exports.
    let exports = lib.split("pub use ").skip(1).filter_map(|rest| rest.split(';').next());
    let home_of: BTreeMap<&str, &str> = exports
        .filter_map(|export| export.split_once("::"))
        .flat_map(|(home, names)| names.split(|c| !is_name(c)).map(move |name| (name, home)))
        .collect();
    let modules: Vec<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';')).collect();
    let needs = |module: &str| {
        let text = read(&format!("{module}.rs"));
        let (code, _) = text.split_once("#[cfg(test)]\nmod tests").unwrap_or((&text, ""));
        let code: String = code.lines().filter_map(|line| line.split("//").next()).collect();
        let paths = code.split("crate::").skip(1).flat_map(|rest| match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default().split(',').collect(),
            None => vec![rest.split(|c| !is_name(c)).next().unwrap_or_default()],
        });
        let names = paths.map(|name| *home_of.get(name.trim()).unwrap_or(&name));
        let names = names.filter(|name| *name != module && modules.contains(name));
        names.map(str::to_owned).collect()
    };
    modules.iter().map(|&module| (module.to_owned(), needs(module))).collect()
}
