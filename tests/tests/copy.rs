//! `sheave copy` where things are not as one would wish.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sheave_tests::{Run, Scratch, Serve, compare, pattern, sheave};

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
fn a_copy_that_was_interrupted_can_be_made_again() {
    let scratch = Scratch::new();
    let (image, other) = (scratch.islands("disk.img", 64 << 20), scratch.filled("o.img", 64 << 20));
    let out = scratch.file("out.img");
    let slow = format!("{other}?limit-bps=8M");
    let mut child = Command::new(sheave()).args(["copy", "--quiet", &slow, &out]).spawn().unwrap();
    thread::sleep(Duration::from_secs(2));
    // Not SIGINT: what is started in the background of a shell ignores it.
    kill_process(Pid::from_child(&child), Signal::TERM).expect("our own child");
    assert!(!child.wait().expect("our own child").success(), "it was not done yet");
    assert!(fs::read(&out).expect("file").iter().any(|byte| *byte != 0), "it had begun");
    // Where the new source has zeroes the old one's bytes must go.
    Run::new(sheave()).args("copy --quiet").arg(&image).arg(&out).ok();
    compare(&image, &out);
}

#[test]
fn onto_itself_or_its_own_server_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.filled("disk.img", 1 << 20);
    Run::new(sheave()).args("copy --quiet").arg(&image).arg(&image).fails();
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
