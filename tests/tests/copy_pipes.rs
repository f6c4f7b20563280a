//! `sheave copy` from and to pipes.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::thread;

use sheave_tests::{Run, Scratch, Serve, compare, have, pattern, sheave, skip};

/// A shell's pipeline; `$0` is the program under test. What it printed on stderr.
#[track_caller]
fn shell(scratch: &Scratch, script: &str) -> String {
    let run = Run::new("bash").args("-c").arg(format!("set -o pipefail; {script}"));
    let output = run.arg(sheave()).in_dir(scratch.path()).output();
    assert!(output.status.success(), "{}", output.describe());
    output.stderr
}

#[test]
fn a_volume_goes_through_a_pipe_and_comes_back_sparse() {
    let scratch = Scratch::new();
    let (image, odd) = (scratch.islands("a.img", 16 << 20), scratch.file("odd.img"));
    fs::write(&odd, pattern(301_001, 7)).expect("write a file");
    for (from, to) in [(&image, "back.img"), (&odd, "back.img"), (&odd, "odd-back.img")] {
        let told = shell(&scratch, &format!("\"$0\" copy {from} - | \"$0\" copy - {to}"));
        assert_eq!(told, "");
        compare(from, scratch.file(to));
    }
    let server = Serve::new(&image).unix();
    let uri = server.uri();
    shell(&scratch, &format!("\"$0\" copy '{uri}' - > plain.img"));
    compare(&image, scratch.file("plain.img"));
    shell(&scratch, "\"$0\" copy - sparse.img < plain.img");
    compare(&image, scratch.file("sparse.img"));
    let blocks = |name: &str| fs::metadata(scratch.file(name)).expect("a file").blocks();
    assert!(blocks("sparse.img") < 8 << 11, "holes: {} blocks", blocks("sparse.img"));
    assert!(!scratch.path().join("-").exists(), "no file is called -");
    shell(&scratch, "\"$0\" copy odd.img ./- && \"$0\" copy ./- dash.img");
    compare(&odd, scratch.file("-"));
    compare(&odd, scratch.file("dash.img"));
}

#[test]
fn what_is_larger_keeps_its_end_and_what_is_smaller_is_refused() {
    let scratch = Scratch::new();
    scratch.filled("in.img", 2 << 20);
    let export = scratch.file("export");
    for (size, fits) in [(3_usize << 20, true), (2 << 20, true), ((2 << 20) - 1, false)] {
        fs::write(&export, pattern(size, 3)).expect("write a file");
        let server = Serve::new(&export).unix();
        let script = format!("\"$0\" copy - '{}' < in.img", server.uri());
        let run = Run::new("sh").args("-c").arg(&script).arg(sheave()).in_dir(scratch.path());
        let output = run.output();
        assert_eq!(output.status.success(), fits, "{}", output.describe());
        let told = output.stderr;
        let want = match size - (2 << 20).min(size) {
            _ if !fits => "incomplete now: the input is longer than its 2097151 bytes",
            0 => "",
            _ => "is larger; its last 1048576 bytes are left as they are",
        };
        assert!(
            told.contains(want) && told.lines().count() == usize::from(!want.is_empty()),
            "{told}"
        );
        if fits {
            let mut expected = pattern(size, 3);
            expected[..2 << 20].copy_from_slice(&pattern(2 << 20, 1));
            assert!(fs::read(&export).expect("file") == expected, "{size}");
        }
    }
}

#[test]
fn zeroes_of_a_pipe_replace_what_an_export_had() {
    let scratch = Scratch::new();
    let image = scratch.islands("a.img", 8 << 20);
    let out = scratch.filled("out.img", 8 << 20);
    let server = Serve::new(&out).unix();
    shell(&scratch, &format!("cat a.img | \"$0\" copy - '{}'", server.uri()));
    compare(image, out);
}

#[test]
fn a_reader_that_ends_is_one_line_and_status_1() {
    let scratch = Scratch::new();
    let image = scratch.filled("a.img", 4 << 20);
    let mut child = Command::new(sheave())
        .args(["copy", &image, "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start sheave");
    let mut begun = [0; 10];
    let mut reader = child.stdout.take().expect("piped");
    reader.read_exact(&mut begun).expect("the first bytes");
    assert_eq!(begun, pattern(10, 1)[..]);
    drop(reader);
    let ended = child.wait_with_output().expect("our own child");
    let told = String::from_utf8(ended.stderr).expect("text");
    assert_eq!(ended.status.code(), Some(1), "{told}");
    assert!(told.contains("standard output: Broken pipe"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

#[test]
fn an_input_that_fails_leaves_what_was_there() {
    let scratch = Scratch::new();
    fs::write(scratch.file("out.img"), "old").expect("write a file");
    for to in ["out.img", "new.img"] {
        let told = Run::new("sh")
            .args("-c")
            .arg(format!("\"$0\" copy - {to} < /"))
            .arg(sheave())
            .in_dir(scratch.path())
            .fails();
        assert!(told.contains("standard input: Is a directory"), "{told}");
    }
    assert_eq!(fs::read(scratch.file("out.img")).expect("file"), b"old");
    assert_eq!(fs::read_dir(scratch.path()).expect("a directory").count(), 1);
}

#[test]
fn an_input_without_a_byte_replaces_nothing() {
    let scratch = Scratch::new();
    fs::write(scratch.file("out.img"), "old").expect("write a file");
    let copy = |to: &str| {
        let command = format!("false | \"$0\" copy - {to}");
        Run::new("sh").args("-c").arg(command).arg(sheave()).in_dir(scratch.path())
    };
    let told = copy("out.img").fails();
    assert!(told.contains("it is empty, and out.img stays as it was"), "{told}");
    assert_eq!(fs::read(scratch.file("out.img")).expect("file"), b"old");
    copy("new.img").ok();
    assert_eq!(fs::read(scratch.file("new.img")).expect("file"), b"");
    assert_eq!(fs::read_dir(scratch.path()).expect("a directory").count(), 2);
}

#[test]
fn named_pipes_work_both_ways() {
    let scratch = Scratch::new();
    let image = scratch.islands("a.img", 4 << 20);
    let (fifo, out) = (scratch.file("fifo"), scratch.file("out.img"));
    Run::new("mkfifo").arg(&fifo).ok();
    let sender = {
        let (image, fifo) = (image.clone(), fifo.clone());
        thread::spawn(move || Run::new(sheave()).args("copy").arg(image).arg(fifo).ok())
    };
    Run::new(sheave()).args("copy").arg(&fifo).arg(&out).ok();
    sender.join().expect("it was sent");
    compare(&image, &out);
    for [from, to] in [[&fifo, &fifo], [&format!("{fifo}?limit-bps=1M"), &out]] {
        let told = Run::new(sheave()).args("copy").arg(from).arg(to).fails();
        assert!(told.contains("pipe"), "{told}");
    }
    Run::new(sheave()).args("copy - -").fails();
}

#[test]
fn a_terminal_is_no_place_for_bytes() {
    if !have("script") {
        return skip("a_terminal_is_no_place_for_bytes", "no script (util-linux)");
    }
    let scratch = Scratch::new();
    scratch.filled("a.img", 1000);
    for (args, stream) in [("a.img -", "output"), ("- b.img", "input")] {
        let command = format!("{} copy {args}; echo status $?", sheave().display());
        let run = Run::new("script").args("-qec").arg(command).arg("/dev/null");
        let told = run.in_dir(scratch.path()).output().stdout;
        assert!(told.contains(&format!("standard {stream}: it is a terminal")), "{told}");
        assert!(told.contains("status 1"), "{told}");
    }
    assert!(File::open(scratch.file("b.img")).is_err(), "nothing was made");
}
