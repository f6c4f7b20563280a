//! A directory as a store, and processes that are killed at each step.

use std::env;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use super::*;
use crate::threads::block_on;

/// Names the step and the directory of a child that dies.
const CHILD: &str = "SHEAVE_DIR_STORE_CHILD";
const SIGABRT: i32 = 6;

fn store(dir: &Path) -> DirStore {
    let store = DirStore::new(&dir.join("v"));
    store.make().unwrap();
    store
}

fn keys(store: &DirStore, prefix: &str, after: &str, max: usize) -> Vec<String> {
    let listed = block_on(store.list(prefix, after, max)).unwrap();
    listed.into_iter().map(|listed| listed.key).collect()
}

#[test]
fn an_object_is_made_once_and_read_in_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let create = |body: &'static str| block_on(store.create("log/1/2", body.into())).unwrap();
    assert_eq!(create("hello"), Created::Made);
    assert_eq!(create("other"), Created::Exists);
    let get = |range| block_on(store.get("log/1/2", range)).unwrap();
    assert_eq!((get(0..5), get(1..3), get(3..99)), ("hello".into(), "el".into(), "lo".into()));
    assert_eq!(get(7..9), "");
    let missing = block_on(store.get("log/1/3", 0..1)).unwrap_err();
    assert_eq!(missing.kind, StoreErrorKind::NotFound);
    block_on(store.delete("log/1/2")).unwrap();
    block_on(store.delete("log/1/2")).unwrap();
    assert_eq!(create("again"), Created::Made, "its directory was deleted with it");
    assert_eq!(fs::read_dir(dir.path().join("v/tmp")).unwrap().count(), 0);
}

#[test]
fn listings_are_sorted_by_the_bytes_of_keys() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut all = ["b/1", "a/2", "a/1", "a-b/1", "a/10", "c/.x", "c/ä %", "c/d/e"];
    for key in all {
        assert_eq!(block_on(store.create(key, key.into())), Ok(Created::Made), "{key}");
    }
    all.sort_unstable();
    assert_eq!(keys(&store, "", "", 99), all);
    assert_eq!(keys(&store, "", "a/10", 3), all[3..6]);
    assert_eq!(keys(&store, "a/", "", 99), ["a/1", "a/10", "a/2"]);
    assert_eq!(keys(&store, "a/1", "a/1", 99), ["a/10"]);
    assert_eq!(keys(&store, "x/", "", 99), [""; 0]);
    let listed = block_on(store.list("c/ä", "", 1)).unwrap();
    assert_eq!(listed, [Listed { key: "c/ä %".to_owned(), bytes: 6 }]);
    assert!(dir.path().join("v/c/%2Ex").exists());
}

#[test]
fn of_many_creations_of_one_name_exactly_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for round in 0..50 {
        let key = format!("root/{round}");
        let bodies: Vec<_> = (0..8).map(|body: u8| Bytes::from(vec![body; 9])).collect();
        let tries: Vec<_> = bodies.iter().map(|body| store.create(&key, body.clone())).collect();
        let made: Vec<_> = tries.into_iter().map(|made| block_on(made).unwrap()).collect();
        let winners: Vec<_> = (0..8).filter(|at| made[*at] == Created::Made).collect();
        assert_eq!(winners.len(), 1, "{made:?}");
        assert_eq!(block_on(store.get(&key, 0..99)).unwrap(), bodies[winners[0]]);
    }
}

#[test]
fn a_directory_that_is_gone_is_not_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    fs::remove_dir_all(dir.path().join("v")).unwrap();
    let error = block_on(store.create("root/1", "x".into())).unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Busy, "it may be mounted again");
    assert!(!dir.path().join("v").exists());
    // The mount point is there.
    fs::create_dir(dir.path().join("v")).unwrap();
    for key in ["root/1", "log/1/1"] {
        let error = block_on(store.create(key, "x".into())).unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Busy);
        assert!(error.why.contains("mount it"), "{error}");
        let error = block_on(store.get(key, 0..1)).unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Busy, "it may be there when it is mounted");
    }
    assert_eq!(fs::read_dir(dir.path().join("v")).unwrap().count(), 0);
    let nowhere = DirStore::new(&dir.path().join("x/y")).make().unwrap_err();
    assert_eq!(nowhere.kind(), sheave_core::ErrorKind::NotFound);
}

#[test]
fn a_sweep_leaves_what_is_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let (path, file) = store.unfinished().unwrap();
    store.sweep().unwrap();
    assert!(path.exists());
    drop(file);
    store.sweep().unwrap();
    assert!(!path.exists());
}

/// Not a test by itself: what the next test runs as a process of its own.
#[test]
fn child_of_the_crash_test() {
    let Ok(task) = env::var(CHILD) else { return };
    let (step, dir) = task.split_once(':').unwrap();
    sheave_durable::on_step(step.parse().unwrap(), process::abort);
    let store = DirStore::new(Path::new(dir));
    store.create_now("log/1/1", &[7; 100]).unwrap();
}

#[test]
fn an_object_is_whole_or_absent_after_its_writer_was_killed_at_any_step() {
    let mut found = Vec::new();
    for step in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", "dir_store::tests::child_of_the_crash_test"]);
        let place = dir.path().join("v");
        let output = child.env(CHILD, format!("{step}:{}", place.display())).output().unwrap();
        let is_killed = output.status.signal() == Some(SIGABRT);
        assert!(output.status.success() || is_killed, "{output:?}");
        store.sweep().unwrap();
        assert!(fs::read_dir(place.join(UNFINISHED)).map_or(0, Iterator::count) == 0);
        let body = block_on(store.get("log/1/1", 0..999)).ok();
        assert_eq!(keys(&store, "", "", 9).len(), usize::from(body.is_some()));
        found.push(body.map(|body| body.len()));
        if output.status.success() {
            break;
        }
    }
    let whole = Some(100);
    assert_eq!(found, [None, None, whole, whole, whole, whole]);
}

#[test]
fn a_listing_leaves_out_what_is_no_object() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for key in ["root/f1", "root/f2"] {
        block_on(store.create(key, key.into())).unwrap();
    }
    let root = dir.path().join("v/root");
    fs::write(root.join(".nfs01"), "").unwrap();
    std::os::unix::fs::symlink("nowhere", root.join("a")).unwrap();
    assert_eq!(keys(&store, "root/", "", 1), ["root/f1"]);
}

#[test]
fn a_file_where_a_directory_must_be_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("v"), "").unwrap();
    let store = DirStore::new(&dir.path().join("v"));
    let refused = [
        block_on(store.list("root/", "", 1)).map(drop),
        block_on(store.get("root/1", 0..1)).map(drop),
        block_on(store.create("log/1/1", "x".into())).map(drop),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().kind, StoreErrorKind::Denied);
    }
}

#[test]
fn volumes_beside_one_are_found() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["b", "a", "c d"] {
        DirStore::new(&dir.path().join(name)).make().unwrap();
    }
    fs::create_dir(dir.path().join("other")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let siblings =
        |name: &str, max| block_on(DirStore::new(&dir.path().join(name)).siblings(max)).unwrap();
    assert_eq!(siblings("missing", 9), ["a", "b", "c d"]);
    assert_eq!(siblings("a", 2), ["a", "b"]);
    assert!(block_on(DirStore::new(&dir.path().join("x/y")).siblings(9)).is_err());
}
