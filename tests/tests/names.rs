//! Files, sockets and directories whose names are no text, or do things to terminals.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_tests::{Run, Scratch, Serve, pattern, sheave};

/// A name with Latin-1, what is never UTF-8, a space, an escape, and a `?`.
const NAME: &[u8] = b"caf\xe9 \xff%3f?.img";
/// Its export's name.
const EXPORT: &str = "caf%E9 %FF%253f?.img";
/// Its place in a URL.
const IN_URL: &str = "caf%E9%20%FF%253f%3F.img";
/// One without a `?`, which would begin parameters behind a bare path.
const BARE: &[u8] = b"caf\xe9 \xff%3f.img";
const SIZE: usize = 300_000;

/// Longer than a daemon takes to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

fn joined(before: &str, path: &Path, after: &str) -> OsString {
    OsString::from_vec([before.as_bytes(), path.as_os_str().as_bytes(), after.as_bytes()].concat())
}

fn image(scratch: &Scratch, name: &[u8]) -> PathBuf {
    let path = scratch.path().join(os(name));
    fs::write(&path, pattern(SIZE, 5)).expect("a file system that takes any name");
    path
}

/// Fails on what a terminal would act on, and on replaced bytes.
#[track_caller]
fn check_plain(text: &str) {
    let odd = text.chars().find(|c| *c == '\u{fffd}' || (c.is_control() && *c != '\n'));
    assert_eq!(odd, None, "{text:?}");
}

#[test]
fn any_file_is_served_and_copied() {
    let scratch = Scratch::new();
    let (named, bare) = (image(&scratch, NAME), image(&scratch, BARE));
    let url = format!("file://{}/{IN_URL}?read-only=true", scratch.path().display());
    let server = Serve::new(url).arg(&bare).unix_named(os(b"s\xe9"));
    let socket = server.scratch().path().join(os(b"s\xe9"));
    let uri = |export: &str| {
        let directory = server.scratch().path().display();
        format!("nbd+unix:///{export}?socket={directory}/s%E9")
    };
    let listed = Run::new("nbdinfo").args("--list").arg(uri("")).ok();
    for export in [EXPORT, "caf%E9 %FF%253f.img"] {
        assert!(listed.contains(&format!("export=\"{export}\":")), "{listed}");
    }
    // To a name that is no text, from a URI with the socket's name as it is.
    let copy = scratch.path().join(os(b"copy\xe9\n.img"));
    let escaped = EXPORT.replace('%', "%25").replace('?', "%3F").replace(' ', "%20");
    let raw = joined(&format!("nbd+unix:///{escaped}?socket="), &socket, "");
    Run::new(sheave()).args("copy --quiet").arg(raw).arg(&copy).ok();
    assert_eq!(fs::read(&copy).expect("the copy"), fs::read(&named).expect("the image"));
    let copy_url = format!("file://{}/copy%E9%0A.img", scratch.path().display());
    let back = scratch.file("back.img");
    Run::new(sheave()).args("copy --quiet").arg(copy_url).arg(&back).ok();
    assert_eq!(fs::read(&back).expect("the copy"), fs::read(&named).expect("the image"));
    let table = server.sheave("stats").ok();
    assert!(table.contains(EXPORT), "{table}");
    let stats = Run::new(sheave()).arg("stats").arg(os(BARE)).args("--json");
    let json = stats.env("SHEAVE_RUNTIME_DIR", server.scratch().path()).ok();
    assert!(json.contains("caf%E9 %FF%253f.img") && !json.contains(EXPORT), "{json}");
    check_plain(&server.log());
    assert!(server.log().contains(r"s\\xe9"), "{}", server.log());
}

#[test]
fn messages_show_names_without_acting_on_terminals() {
    let scratch = Scratch::new();
    let missing = scratch.path().join(os(b"no\xe9\n\x1b[2Jsheave: done.img"));
    for command in ["serve", "copy"] {
        let told = Run::new(sheave()).arg(command).arg(&missing).arg(scratch.file("a")).fails();
        check_plain(&told);
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(told.contains(r"no\xe9\n\u{1b}[2Jsheave: done.img"), "{told}");
    }
    let wrong = Run::new(sheave()).arg("serve").arg(os(b"a\xe9\x1b[2J?size=1")).output();
    assert_eq!(wrong.status.code(), Some(2), "{}", wrong.describe());
    check_plain(&wrong.stderr);
    assert!(wrong.stderr.contains(r"invalid value 'a\xe9\u{1b}[2J?size=1'"), "{}", wrong.stderr);
    let named = Serve::new("memory:?size=1M").arg("--name").arg("a\n\u{1b}]0;title\u{7}");
    let named = named.log_level("debug").unix();
    Run::new("nbdinfo").arg(named.uri()).ok();
    let table = named.sheave("stats").ok();
    check_plain(&table);
    assert!(table.contains(r"a\n\u{1b}]0;title\u{7}: 0 connections"), "{table}");
    let lines = named.sheave("top --count 1 --interval 0.1").ok();
    check_plain(&lines);
    let json = named.sheave("stats --json").ok();
    assert!(json.contains(r#""a\n\u001b]0;title\u0007""#), "{json}");
    check_plain(&named.log());
}

#[test]
fn a_daemon_opens_any_file_and_may_live_in_any_directory() {
    let scratch = Scratch::new();
    let runtime = scratch.path().join(os(b"run \xe9"));
    fs::create_dir(&runtime).expect("a directory");
    let daemon = Daemon::start(&scratch, &runtime);
    let client =
        |command: &str| Run::new(sheave()).args(command).env("SHEAVE_RUNTIME_DIR", &runtime);
    assert_eq!(client("ls").ok(), "no devices\n");
    fs::write(scratch.path().join(os(b"odd\xe9.img")), vec![0; 513]).expect("a file");
    // A size that no device can have is seen only once the file is open.
    for volume in [scratch.path().join(os(b"odd\xe9.img")).into(), OsString::from("./odd")] {
        let relative = volume == "./odd";
        let volume = if relative { OsString::from_vec(b"./odd\xe9.img".to_vec()) } else { volume };
        let told = client("attach").arg(volume).in_dir(scratch.path()).fails();
        assert!(told.contains("513"), "{told}");
    }
    let told = client("attach").arg(scratch.path().join(os(b"no\xe9\n.img"))).fails();
    assert!(told.contains(r"no\xe9\n.img: No such file"), "{told}");
    let told = client("detach").arg(scratch.path().join(os(b"odd\xe9.img"))).fails();
    assert!(told.contains("/odd%E9.img: neither a device nor a volume"), "{told}");
    let told = client("volume resize --size 1K").arg(os(b"odd\xe9.img"));
    assert_eq!(told.in_dir(scratch.path()).ok(), "1024\n");
    check_plain(&daemon.log());
}

/// A daemon that ends with the test.
struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn start(scratch: &Scratch, runtime: &Path) -> Self {
        let log = scratch.path().join("log");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(sheave())
            .arg("daemon")
            .env("SHEAVE_RUNTIME_DIR", runtime)
            .env("SHEAVE_STATE_DIR", scratch.path().join(os(b"state\xe9")))
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).expect("a file"))
            .spawn()
            .expect("setpriv (util-linux)");
        let mut daemon = Self { child, log };
        let begun = Instant::now();
        while !daemon.log().contains("ready") {
            let ended = daemon.child.try_wait().expect("our own child");
            let late = begun.elapsed() > PATIENCE;
            assert!(ended.is_none() && !late, "{ended:?}:\n{}", daemon.log());
            sleep(Duration::from_millis(20));
        }
        daemon
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("the log")).into_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
