//! `sheave` in a directory with nothing but itself: no /proc, no /sys, no /dev.

use std::fs;
use std::path::Path;

use sheave_tests::{Run, Scratch, Serve, compare, pattern, sheave, skip};

/// What the program needs to be started, in the places where it looks for it.
fn fill(root: &Path) {
    fs::copy(sheave(), root.join("sheave")).expect("room for the program");
    let list = Run::new("ldd").arg(sheave()).ok();
    for library in list.split_whitespace().filter(|word| word.starts_with('/')) {
        let inside = root.join(&library[1..]);
        fs::create_dir_all(inside.parent().expect("a directory")).expect("a directory");
        fs::copy(library, inside).expect("room for a library");
    }
}

/// A root directory, or the reason why there can be none.
fn root_or_skip(test: &str) -> Option<Scratch> {
    if !rustix::process::geteuid().is_root() {
        skip(test, "chroot is for root");
        return None;
    }
    let scratch = Scratch::new();
    fill(scratch.path());
    let tried = inside(&scratch).args("/sheave --version").output();
    if !tried.status.success() {
        skip(test, &format!("chroot: {}", tried.stderr.trim()));
        return None;
    }
    Some(scratch)
}

fn inside(root: &Scratch) -> Run {
    Run::new("chroot").arg(root.path()).env("SHEAVE_RUNTIME_DIR", "/run-sheave")
}

#[test]
fn volumes_are_copied_and_what_is_lost_is_said_once() {
    let Some(root) = root_or_skip("volumes_are_copied_and_what_is_lost_is_said_once") else {
        return;
    };
    let image = root.islands("a.img", 4 << 20);
    for to in ["/b.img", "b.img"] {
        let copied = inside(&root).args("/sheave copy --quiet a.img").arg(to).output();
        assert!(copied.status.success(), "{}", copied.describe());
        assert!(copied.stderr.contains("/proc is not mounted"), "{}", copied.describe());
        assert_eq!(copied.stderr.lines().count(), 1, "{}", copied.describe());
        compare(&image, root.file("b.img"));
    }
    let told = inside(&root).args("/sheave daemon").fails();
    assert!(told.contains("/proc") && told.lines().count() == 1, "{told}");
}

#[test]
fn volumes_are_served_with_statistics() {
    let Some(root) = root_or_skip("volumes_are_served_with_statistics") else { return };
    fs::write(root.file("a.img"), pattern(300_000, 3)).expect("write a file");
    fs::create_dir(root.file("run-sheave")).expect("a directory");
    // In place of the program outside, whose name it is given.
    let chroot = format!(
        "shift; SHEAVE_RUNTIME_DIR=/run-sheave exec chroot {} /sheave \"$@\"",
        root.path().display()
    );
    let server = Serve::new("/a.img").through(&["sh", "-c", &chroot, "sh"]).tcp();
    let copy = root.file("copy.img");
    Run::new("nbdcopy").arg(server.uri()).arg(&copy).ok();
    compare(root.file("a.img"), copy);
    let table = inside(&root).args("/sheave stats").ok();
    assert!(table.contains("a.img: 0 connections"), "{table}");
    assert_eq!(server.log().matches("/proc is not mounted").count(), 1, "{}", server.log());
}
