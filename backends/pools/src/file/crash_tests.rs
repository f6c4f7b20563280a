//! What is left of calls whose process is killed.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{self, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

use super::tests::{MIB, files, new, pool, sized};
use super::*;

/// Names the directory and the step of a child that dies.
const CHILD: &str = "SHEAVE_POOL_CHILD";
const SIGKILL: i32 = 9;

#[test]
fn calls_do_not_wait_until_the_pool_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let [gone, kept] = ["gone", "kept"].map(|name| pool(dir.path()).create(&new(name)).unwrap());
    // As a creation that died leaves it, behind a name that is never read to its end.
    fs::remove_file(dir.path().join(format!("{}.json", gone.record.uuid))).unwrap();
    let pipe = dir.path().join("names/pipe.json");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let pool = pool(dir.path());
    let made = pool.create(&new("a")).unwrap();
    assert_eq!(pool.list(None, usize::MAX).unwrap(), [kept, made]);
    // The read ends.
    drop(OpenOptions::new().write(true).open(&pipe).unwrap());
    fs::remove_file(&pipe).unwrap();
    let give_up = Instant::now() + Duration::from_secs(60);
    while files(dir.path()).len() > 6 {
        assert!(Instant::now() < give_up, "{:?}", files(dir.path()));
        sleep(Duration::from_millis(10));
    }
}

/// Not a test by itself: what the next tests run as a process of its own.
#[test]
fn child_of_the_crash_tests() {
    let Ok(told) = env::var(CHILD) else { return };
    let [call, step, dir] = told.splitn(3, ':').collect::<Vec<_>>()[..] else { panic!("{told}") };
    let pool = pool(Path::new(dir));
    let uuid = pool.get(Key::Name("victim")).ok().map(|found| found.record.uuid);
    durable::on_step(step.parse().unwrap(), || {
        let _ = kill_process(getpid(), Signal::KILL);
        process::abort();
    });
    match call {
        "create" => drop(pool.create(&new("victim")).unwrap()),
        _ => pool.delete(uuid.unwrap()).unwrap(),
    }
}

/// Has a process killed at this step of a call; false if the call has fewer steps.
fn killed_at(call: &str, step: i64, dir: &Path) -> bool {
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "file::crash_tests::child_of_the_crash_tests"]);
    let output =
        child.env(CHILD, format!("{call}:{step}:{}", dir.to_str().unwrap())).output().unwrap();
    assert!(output.status.success() || output.status.signal() == Some(SIGKILL), "{output:?}");
    !output.status.success()
}

#[test]
fn rule_02_a_creation_that_is_killed_leaves_nothing_or_one_volume() {
    for step in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let is_killed = killed_at("create", step, dir.path());
        // Another call about the pool has it undone, if it does not exist yet.
        let other = pool(dir.path()).create(&new("other")).unwrap();
        pool(dir.path()).sweep().unwrap();
        let listed = pool(dir.path()).list(None, usize::MAX).unwrap();
        let left = files(dir.path());
        assert_eq!(left.len(), 3 * listed.len(), "step {step}: {left:?}");
        // The same call again makes it, once.
        let made = pool(dir.path()).create(&new("victim")).unwrap();
        assert_eq!(made.size, 4 * MIB, "step {step}");
        assert_eq!(pool(dir.path()).list(None, usize::MAX).unwrap().len(), 2, "step {step}");
        assert_eq!(files(dir.path()).len(), 6, "step {step}");
        for found in [made, other] {
            pool(dir.path()).delete(found.record.uuid).unwrap();
        }
        assert_eq!(files(dir.path()), BTreeSet::new(), "step {step}");
        if !is_killed {
            assert!(step > 6, "it has steps: {step}");
            return;
        }
    }
}

#[test]
fn rule_02_a_creation_that_is_killed_is_taken_up_by_the_same_call() {
    for step in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let is_killed = killed_at("create", step, dir.path());
        let pool = pool(dir.path());
        let made = pool.create(&sized("victim", 4 * MIB, 4 * MIB)).unwrap();
        assert_eq!(pool.list(None, usize::MAX).unwrap(), [made], "step {step}");
        assert_eq!(files(dir.path()).len(), 3, "step {step}");
        if !is_killed {
            return;
        }
    }
}

#[test]
fn rule_05_a_deletion_that_is_killed_is_finished() {
    for step in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let had = pool(dir.path()).create(&new("victim")).unwrap();
        let kept = pool(dir.path()).create(&new("kept")).unwrap();
        let is_killed = killed_at("delete", step, dir.path());
        let listed = pool(dir.path()).list(None, usize::MAX).unwrap();
        assert!(listed.contains(&kept) && listed.len() <= 2, "step {step}");
        if step % 2 == 0 {
            pool(dir.path()).delete(had.record.uuid).unwrap();
        } else if listed.len() == 1 {
            // Any change finishes it, also that which makes another volume of its name.
            let again = pool(dir.path()).create(&new("victim")).unwrap();
            assert_ne!(again.record.uuid, had.record.uuid, "step {step}");
            pool(dir.path()).delete(had.record.uuid).unwrap();
            assert_eq!(pool(dir.path()).get(Key::Name("victim")).unwrap(), again);
            pool(dir.path()).delete(again.record.uuid).unwrap();
        } else {
            pool(dir.path()).delete(had.record.uuid).unwrap();
        }
        pool(dir.path()).sweep().unwrap();
        assert_eq!(pool(dir.path()).list(None, usize::MAX).unwrap(), [kept], "step {step}");
        assert_eq!(files(dir.path()).len(), 3, "step {step}");
        if !is_killed {
            assert!(step > 6, "it has steps: {step}");
            return;
        }
    }
}
