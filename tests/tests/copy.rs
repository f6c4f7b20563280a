//! `sheave copy` where things are not as one would wish.

use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use sheave_tests::{Run, Scratch, Serve, compare, eventually, pattern, sheave};

#[test]
fn to_and_from_a_server_that_takes_whole_blocks_only() {
    let scratch = Scratch::new();
    let full = scratch.filled("full.img", 1 << 20);
    let odd = scratch.file("odd.img");
    fs::write(&odd, pattern(301_001, 7)).expect("write a file");
    let (out, back) = (scratch.file("out.img"), scratch.file("back.img"));
    let sheave = sheave().display().to_string();
    let commands = format!(
        "nbdcopy {full} \"$uri\" && {sheave} copy --quiet {odd} \"$uri\" && \
         nbdcopy \"$uri\" {out} && {sheave} copy --quiet \"$uri\" {back}"
    );
    Run::new("nbdkit")
        .args("-U - --filter=blocksize-policy memory 1M blocksize-error-policy=error")
        .args("blocksize-minimum=4096 blocksize-preferred=4096 blocksize-maximum=256k --run")
        .arg(commands)
        .ok();
    let mut want = fs::read(&full).expect("file");
    want[..301_001].copy_from_slice(&pattern(301_001, 7));
    assert!(fs::read(&out).expect("file") == want, "the odd end and what was behind it");
    compare(&out, &back);
}

#[test]
fn what_is_interrupted_leaves_no_image_that_looks_whole() {
    let scratch = Scratch::new();
    let from = format!("{}?limit-bps=8M", scratch.filled("o.img", 64 << 20));
    let out = scratch.file("out.img");
    for signal in [Signal::INT, Signal::TERM, Signal::QUIT, Signal::HUP] {
        let told = interrupted(&from, &out, signal, || names(&scratch).contains("out.img"));
        assert!(told.contains("interrupted; nothing was left behind"), "{signal:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        assert_eq!(names(&scratch), "o.img", "after {signal:?}");
    }
}

#[test]
fn a_copy_onto_an_image_is_all_of_it_or_nothing() {
    let scratch = Scratch::new();
    let (image, other) = (scratch.islands("disk.img", 64 << 20), scratch.filled("o.img", 64 << 20));
    let out = scratch.sparse("out.img", 64 << 20);
    let slow = format!("{other}?limit-bps=8M");
    let told = interrupted(&slow, &out, Signal::TERM, || names(&scratch).contains(".partial"));
    assert!(told.contains("interrupted; nothing was left behind"), "{told}");
    assert_eq!(names(&scratch), "disk.img o.img out.img");
    assert!(fs::read(&out).expect("file").iter().all(|byte| *byte == 0), "it is as it was");
    Run::new(sheave()).args("copy --quiet").arg(&image).arg(&out).ok();
    compare(&image, &out);
}

#[test]
fn a_copy_onto_an_export_that_was_interrupted_can_be_made_again() {
    let scratch = Scratch::new();
    let (image, other) = (scratch.islands("disk.img", 64 << 20), scratch.filled("o.img", 64 << 20));
    let out = scratch.sparse("out.img", 64 << 20);
    let server = Serve::new(&out).unix();
    let slow = format!("{other}?limit-bps=8M");
    let has_begun = || fs::read(&out).expect("file").iter().any(|byte| *byte != 0);
    let told = interrupted(&slow, &server.uri(), Signal::TERM, has_begun);
    assert!(told.contains(&format!("{} is incomplete", server.uri())), "{told}");
    // Where the new source has zeroes the old one's bytes must go.
    Run::new(sheave()).args("copy --quiet").arg(&image).arg(server.uri()).ok();
    compare(&image, &out);
}

#[test]
fn what_fails_leaves_no_image_that_looks_whole() {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 8 << 20);
    let out = scratch.file("out.img");
    let full = format!("{out}?fault=write:error=ENOSPC:after=3");
    let told = Run::new(sheave()).args("copy --quiet").arg(&image).arg(&full).fails();
    assert!(!told.contains("incomplete"), "{told}");
    Run::new(sheave())
        .args("copy --quiet")
        .arg(&image)
        .arg(format!("{out}?read-only=true"))
        .fails();
    assert_eq!(names(&scratch), "disk.img");
    scratch.sparse("out.img", 8 << 20);
    let told = Run::new(sheave()).args("copy --quiet").arg(&image).arg(&full).fails();
    assert!(!told.contains("incomplete"), "{told}");
    assert_eq!(names(&scratch), "disk.img out.img", "what was there before stays");
    assert!(fs::read(&out).expect("file").iter().all(|byte| *byte == 0), "as it was");
    let server = Serve::new("memory:?size=8M&fault=write:error=ENOSPC:after=3").unix();
    let told = Run::new(sheave()).args("copy --quiet").arg(&image).arg(server.uri()).fails();
    assert!(told.contains("which is incomplete now"), "{told}");
}

#[test]
fn an_image_becomes_as_long_as_the_source_and_other_targets_keep_their_size() {
    let scratch = Scratch::new();
    let (small, large) = (scratch.filled("small", 1 << 20), scratch.filled("large", 3 << 20));
    let copy = |from: &str, to: &str| {
        let output = Run::new(sheave()).args("copy --quiet").arg(from).arg(to).output();
        assert!(output.status.success(), "{}", output.describe());
        output.stderr
    };
    let old = scratch.filled("old", 2 << 20);
    for source in [&small, &large] {
        assert_eq!(copy(source, &old), "", "nothing to tell");
        compare(source, &old);
    }
    let export = scratch.file("export");
    fs::write(&export, pattern(2 << 20, 3)).expect("write a file");
    let server = Serve::new(&export).unix();
    let told = copy(&small, &server.uri());
    let want = format!("{} is larger; its last 1048576 bytes are left as they are", server.uri());
    assert_eq!(told.trim_end(), want);
    let mut expected = pattern(2 << 20, 3);
    expected[..1 << 20].copy_from_slice(&pattern(1 << 20, 1));
    assert!(fs::read(&export).expect("file") == expected, "its end stays");
    let told = Run::new(sheave()).args("copy --quiet").arg(&large).arg(server.uri()).fails();
    assert!(told.contains("has 2097152 bytes, too few for the 3145728 of"), "{told}");
    assert!(fs::read(&export).expect("file") == expected, "nothing was written");
}

#[test]
fn onto_itself_or_its_own_server_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 1 << 20);
    let other_name = scratch.file("link.img");
    fs::hard_link(&image, &other_name).expect("a link");
    for to in [&image, &other_name] {
        let told = Run::new(sheave()).args("copy --quiet").arg(&image).arg(to).fails();
        assert!(told.contains("source and target are the same file"), "{told}");
    }
    let server = Serve::new(&image).unix();
    Run::new(sheave()).args("copy --quiet").arg(server.uri()).arg(&image).fails();
    assert!(fs::read(&image).expect("file") == pattern(1 << 20, 1), "it is as it was");
}

#[test]
fn a_source_that_fails_fails_the_copy() {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 8 << 20);
    let server = Serve::new(format!("{image}?fault=read:error=EIO:after=3")).unix();
    let output = Run::new(sheave()).args("copy --quiet").arg(server.uri());
    let output = output.arg(scratch.file("out.img")).output();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(output.stderr.contains("on purpose"), "{}", output.describe());
    assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
}

/// Starts a copy, ends it by a signal as soon as it has begun, and returns its output. Signals
/// without a meaning do not end it.
#[track_caller]
fn interrupted(from: &str, to: &str, signal: Signal, has_begun: impl Fn() -> bool) -> String {
    let mut command = Command::new(sheave());
    let command = command.args(["copy", "--quiet", from, to]).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start sheave");
    assert!(eventually(has_begun), "the copy does not begin");
    for signal in [Signal::USR1, Signal::USR2, signal] {
        kill_process(Pid::from_child(&child), signal).expect("our own child");
    }
    let mut told = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut told).expect("read a pipe");
    assert_eq!(child.wait().expect("our own child").code(), Some(1), "it was not done: {told}");
    told
}

/// The names of all files in a directory, sorted.
fn names(scratch: &Scratch) -> String {
    let entries = fs::read_dir(scratch.path()).expect("a directory");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<_> = entries.map(|entry| name(entry).into_string().expect("text")).collect();
    names.sort();
    names.join(" ")
}
