//! Tests that cannot run here say so, aloud and in a list.

use std::fs::{self, OpenOptions};
use std::io::Write as _;

/// Prints a line that is seen in the output of the tests.
#[expect(clippy::print_stderr, reason = "what libtest shows only for a test that fails")]
pub(crate) fn note(text: &str) {
    eprint!("{text}");
}

/// Tells that a test is skipped and why: on stderr, and in the file `$SHEAVE_SKIP_LOG`, which
/// `make test` shows at its end.
pub fn skip(test: &str, reason: &str) {
    let line = format!("skipped: {test}: {reason}\n");
    note(&line);
    if let Ok(path) = std::env::var("SHEAVE_SKIP_LOG") {
        let mut log = OpenOptions::new().create(true).append(true).open(path).expect("skip log");
        log.write_all(line.as_bytes()).expect("skip log");
    }
}

/// Whether the kernel lets this process use io_uring; if not, the test is skipped.
#[must_use]
pub fn uring_or_skip(test: &str) -> bool {
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let reason = match disabled.as_deref().map(str::trim) {
        Ok("0") => return true,
        Ok("1") if rustix::process::geteuid().is_root() => return true,
        Ok(value) => format!("kernel.io_uring_disabled is {value}"),
        // Kernels before 6.6 have io_uring, but not the switch.
        Err(_) => return true,
    };
    skip(test, &reason);
    false
}
