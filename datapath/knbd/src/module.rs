//! The driver as a module of the kernel.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The program with which the kernel loads modules; empty where it must not.
const MODPROBE: &str = "/proc/sys/kernel/modprobe";
/// It takes milliseconds, unless the kernel hangs.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
const LOAD_POLL: Duration = Duration::from_millis(2);

/// Loads a module as the kernel would. Failures are ignored: the first use of the driver reports
/// them.
pub(crate) fn load(name: &str) {
    let program = fs::read_to_string(MODPROBE).unwrap_or_default();
    let mut command = Command::new(program.trim_end());
    command.args(["-q", "--", name]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return };
    let begun = Instant::now();
    while let Ok(None) = child.try_wait() {
        if begun.elapsed() > LOAD_TIMEOUT {
            // Not waited for: inside the kernel it may not die.
            let _ = child.kill();
            return;
        }
        sleep(LOAD_POLL);
    }
}
