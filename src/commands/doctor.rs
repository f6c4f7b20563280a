//! `sheave doctor`: what works on this node, and advice about what does not.

mod server;

use std::fs;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit};
use serde::Serialize;
use sheave_bench::output;
use sheave_control::v1::GetVersionRequest;
use sheave_ring::{Probe, Support};

use super::attach::{call, connect};
use super::volume_parser;
use crate::process::runtime;

/// The oldest kernel whose io_uring is used, and the one with all its features that are used.
const KERNEL_URING: (u32, u32) = (5, 19);
const KERNEL_FULL: (u32, u32) = (6, 13);
/// File descriptors that a busy server needs: one or two for each connection.
const NOFILE_WANTED: u64 = 4096;

/// The features of newer kernels.
const LATER_KERNELS: &str =
    "nothing must be done; Linux 6.1 (DEFER_TASKRUN) and 6.13 (registered files) take less CPU";

/// Tell what this node, or an NBD server, can do, and what to do about what it cannot.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sheave doctor
  sheave doctor nbd://server/disk
  sheave doctor 'nbds://server/disk?tls-certificates=/etc/pki/nbd'
  sheave doctor --json | jq '.[] | select(.advice)'     what something can be done about")]
pub(crate) struct Args {
    /// An export of an NBD server, to tell what that offers instead
    #[arg(value_parser = volume_parser())]
    server: Option<String>,
    /// Print JSON: a list of findings
    #[arg(long)]
    json: bool,
}

/// How well a feature works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// Completely.
    Ok,
    /// With restrictions.
    Limited,
    /// Not at all.
    Missing,
    /// This version does not use it.
    Unused,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The feature.
    pub(crate) name: &'static str,
    /// How well it works.
    pub(crate) status: Status,
    /// The finding.
    pub(crate) detail: String,
    /// Advice, and the purpose of the feature, if there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

impl Finding {
    pub(crate) fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), advice: None }
    }

    pub(crate) fn limited(
        name: &'static str,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let (detail, advice) = (detail.into(), Some(advice.into()));
        Self { name, status: Status::Limited, detail, advice }
    }

    pub(crate) fn missing(
        name: &'static str,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { status: Status::Missing, ..Self::limited(name, detail, advice) }
    }

    pub(crate) fn unused(name: &'static str, detail: impl Into<String>) -> Self {
        Self { status: Status::Unused, ..Self::ok(name, detail) }
    }
}

/// Prints the results of trying features, and of looking at files and limits.
///
/// # Errors
/// When standard output cannot be written, or a server cannot be reached.
pub(crate) fn run(args: Args) -> Result<()> {
    let findings = match &args.server {
        Some(server) => server::findings(server).context("doctor")?,
        None => this_node(),
    };
    let colored = io::stdout().is_terminal();
    let text = if args.json {
        serde_json::to_string_pretty(&findings).context("doctor")? + "\n"
    } else {
        findings.iter().map(|finding| lines(finding, colored)).collect()
    };
    output::to_stdout(text).context("doctor")
}

fn this_node() -> Vec<Finding> {
    let is_root = rustix::process::geteuid().is_root();
    let mut findings = vec![
        uring(sheave_ring::probe()),
        ublk(is_root.then(sheave_daemon::probe_ublk)),
        nbd(is_root.then(sheave_knbd::is_available)),
        daemon(),
    ];
    findings.extend(Node::this().findings());
    findings
}

fn lines(finding: &Finding, colored: bool) -> String {
    let Finding { name, status, detail, advice } = finding;
    let (word, color) = match status {
        Status::Ok => ("ok", "32"),
        Status::Limited => ("limited", "33"),
        Status::Missing => ("missing", "31"),
        Status::Unused => ("unused", "2"),
    };
    let word = format!("{word:8}");
    let word = if colored { format!("\x1b[{color}m{word}\x1b[0m") } else { word };
    let advice = advice.iter().map(|advice| format!("{:25}→ {advice}\n", ""));
    format!("{word} {name:15} {detail}\n{}", advice.collect::<String>())
}

/// The result of making a ublk device, if that was possible.
fn ublk(probed: Option<sheave_core::Result<()>>) -> Finding {
    let name = "ublk device";
    match probed {
        Some(Ok(())) => Finding::ok(name, "works: `sheave attach` makes /dev/ublkbN"),
        Some(Err(error)) => {
            let advice = "it wants Linux 6.5 or later, its driver (`modprobe ublk_drv`), io_uring \
                          and CAP_SYS_ADMIN; without, `sheave attach` makes slower /dev/nbdN, and \
                          serving does not need it";
            Finding::missing(name, error.to_string(), advice)
        }
        None => Finding::unused(name, "not tried: only root can make devices"),
    }
}

/// The result of a query for the kernel's NBD client.
fn nbd(found: Option<sheave_core::Result<()>>) -> Finding {
    let name = "nbd device";
    match found {
        None => Finding::unused(name, "not tried: only root can make devices"),
        Some(Ok(())) => Finding::ok(name, "works: /dev/nbdN by `sheave attach` or nbd-client"),
        Some(Err(error)) => {
            let advice = "`modprobe nbd` as root if there is to be /dev/nbdN here; serving does \
                          not need it";
            Finding::missing(name, error.to_string(), advice)
        }
    }
}

/// The daemon that answers.
fn daemon() -> Finding {
    let (name, own) = ("daemon", env!("CARGO_PKG_VERSION"));
    let asked = runtime().and_then(|runtime| {
        runtime.block_on(async {
            Ok(call(connect().await?.get_version(GetVersionRequest {})).await?.version)
        })
    });
    match asked {
        Ok(version) if version == own => Finding::ok(name, format!("version {version} runs")),
        Ok(version) => Finding::limited(
            name,
            format!("version {version} runs, and this is {own}"),
            "`systemctl reload sheave`, or `sheave daemon --takeover`, once this one is installed",
        ),
        Err(error) => Finding::unused(name, format!("{error:#}")),
    }
}

/// The result of trying io_uring.
fn uring(probed: io::Result<Probe>) -> Finding {
    let name = "io_uring";
    let threads = "until then `sheave serve` uses threads, at more CPU per request";
    match probed {
        Ok(Probe { mode: Support::DeferTaskrun, registered_files: true }) => {
            Finding::ok(name, "works, with DEFER_TASKRUN and registered files")
        }
        Ok(Probe { mode, registered_files }) => {
            let mode = match mode {
                Support::DeferTaskrun => "DEFER_TASKRUN",
                Support::CoopTaskrun => "COOP_TASKRUN",
            };
            let files = if registered_files { "registered" } else { "plain" };
            let detail = format!("works, with {mode} and {files} files");
            Finding::limited(name, detail, LATER_KERNELS)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let advice = format!(
                "see the sysctl below; in a container allow the io_uring_* calls in its seccomp \
                 profile; {threads}"
            );
            Finding::missing(name, error.to_string(), advice)
        }
        Err(error) => {
            let advice = format!("use Linux 5.19 or later, 6.13 at best; {threads}");
            Finding::missing(name, error.to_string(), advice)
        }
    }
}

/// The inputs of the checks.
struct Node {
    /// The directory of `proc`, `sys` and `dev`.
    root: PathBuf,
    release: String,
    nofile: Rlimit,
    memlock: Rlimit,
    is_root: bool,
}

impl Node {
    fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
            release: rustix::system::uname().release().to_string_lossy().into_owned(),
            nofile: getrlimit(Resource::Nofile),
            memlock: getrlimit(Resource::Memlock),
            is_root: rustix::process::geteuid().is_root(),
        }
    }

    fn findings(&self) -> Vec<Finding> {
        vec![self.kernel(), self.uring_sysctl(), self.nofile(), self.memlock(), self.ktls()]
    }

    fn kernel(&self) -> Finding {
        let name = "kernel";
        let detail = format!("Linux {}", self.release);
        match kernel_version(&self.release) {
            Some(version) if version >= KERNEL_FULL => Finding::ok(name, detail),
            Some(version) if version >= KERNEL_URING => {
                Finding::limited(name, detail, LATER_KERNELS)
            }
            Some(_) => {
                let advice = "io_uring needs Linux 5.19 or later; until then `sheave serve` uses \
                              threads";
                Finding::missing(name, detail, advice)
            }
            None => Finding::limited(name, detail, "its version is not understood; just try"),
        }
    }

    fn uring_sysctl(&self) -> Finding {
        let name = "io_uring sysctl";
        let off =
            "`sysctl kernel.io_uring_disabled=0` as root; until then `sheave serve` uses threads";
        match self.read("proc/sys/kernel/io_uring_disabled").as_deref() {
            None => Finding::ok(name, "this kernel has no switch that disables io_uring"),
            Some("0") => Finding::ok(name, "kernel.io_uring_disabled = 0"),
            Some("1") if self.is_root => {
                Finding::ok(name, "kernel.io_uring_disabled = 1, which exempts root")
            }
            Some("1") => {
                let detail = "kernel.io_uring_disabled = 1: only for root and one group";
                let advice = format!("join the group kernel.io_uring_group, or {off}");
                Finding::limited(name, detail, advice)
            }
            Some(value) => {
                Finding::missing(name, format!("kernel.io_uring_disabled = {value}"), off)
            }
        }
    }

    fn ktls(&self) -> Finding {
        let name = "kernel TLS";
        let ulps = self.read("proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
        let loaded = match ulps.split_whitespace().any(|ulp| ulp == "tls") {
            true => "is loaded",
            false => "is not loaded",
        };
        let detail = format!("the tls module {loaded}; this version does TLS in user space");
        Finding::unused(name, detail)
    }

    fn nofile(&self) -> Finding {
        let (current, maximum) = (self.nofile.current, self.nofile.maximum);
        let tell = |limit: Option<u64>| match limit {
            Some(files) => files.to_string(),
            None => "none".to_owned(),
        };
        // Serving raises the soft limit (`raise_open_files`).
        let detail = format!(
            "soft limit {}, hard limit {}; `sheave serve` and the daemon use the hard one",
            tell(current),
            tell(maximum)
        );
        if maximum.is_none_or(|files| files >= NOFILE_WANTED) {
            return Finding::ok("open files", detail);
        }
        let advice = format!(
            "`ulimit -Hn {NOFILE_WANTED}` as root, or LimitNOFILE={NOFILE_WANTED} in the systemd \
             unit; each connection takes one or two, each exported file five"
        );
        Finding::limited("open files", detail, advice)
    }

    fn memlock(&self) -> Finding {
        let kib = |limit: Option<u64>| match limit {
            Some(bytes) => format!("{} KiB", bytes >> 10),
            None => "none".to_owned(),
        };
        let detail = format!(
            "soft limit {}, hard limit {}; only the daemon locks memory, up to the hard one; rings \
             are not counted",
            kib(self.memlock.current),
            kib(self.memlock.maximum)
        );
        if self.memlock.maximum.is_none() || self.is_root {
            return Finding::ok("locked memory", detail);
        }
        Finding::unused("locked memory", detail)
    }

    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }
}

/// Major and minor number of a release such as `6.12.43+deb13-amd64`.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(root: &std::path::Path) -> Node {
        let limit = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
        Node {
            root: root.to_owned(),
            release: "6.18.3+deb14-amd64".to_owned(),
            nofile: limit(1024),
            memlock: limit(64 << 10),
            is_root: false,
        }
    }

    fn statuses(node: &Node) -> Vec<(&'static str, Status)> {
        node.findings().iter().map(|finding| (finding.name, finding.status)).collect()
    }

    fn put(root: &std::path::Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_bare_node_lacks_drivers_and_limits() {
        use Status::{Limited, Ok, Unused};
        let root = tempfile::tempdir().unwrap();
        let bare = node(root.path());
        let expected = [
            ("kernel", Ok),
            ("io_uring sysctl", Ok),
            ("open files", Limited),
            ("locked memory", Unused),
            ("kernel TLS", Unused),
        ];
        assert_eq!(statuses(&bare), expected);
        for finding in bare.findings() {
            let is_fine = matches!(finding.status, Ok | Unused);
            assert_eq!(is_fine, finding.advice.is_none(), "{finding:?}");
        }
    }

    #[test]
    fn a_prepared_node_lacks_nothing() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "proc/sys/kernel/io_uring_disabled", "0\n");
        put(root.path(), "proc/sys/net/ipv4/tcp_available_ulp", "espintcp mptcp tls\n");
        let unlimited = Rlimit { current: None, maximum: None };
        let prepared = Node { nofile: unlimited, ..node(root.path()) };
        for finding in prepared.findings() {
            assert!(matches!(finding.status, Status::Ok | Status::Unused), "{finding:?}");
            assert!(!finding.detail.contains("not loaded"), "{finding:?}");
        }
    }

    #[test]
    fn the_hard_limit_of_open_files_counts() {
        let root = tempfile::tempdir().unwrap();
        let nofile = Rlimit { current: Some(1024), maximum: Some(524_288) };
        let finding = Node { nofile, ..node(root.path()) }.nofile();
        assert_eq!(finding.status, Status::Ok);
        assert!(finding.detail.starts_with("soft limit 1024, hard limit 524288;"), "{finding:?}");
    }

    #[test]
    fn the_switch_of_io_uring_is_understood() {
        let root = tempfile::tempdir().unwrap();
        for (value, is_root, expected) in [
            ("0", false, Status::Ok),
            ("1", false, Status::Limited),
            ("1", true, Status::Ok),
            ("2", false, Status::Missing),
            ("2", true, Status::Missing),
        ] {
            put(root.path(), "proc/sys/kernel/io_uring_disabled", value);
            let finding = Node { is_root, ..node(root.path()) }.uring_sysctl();
            assert_eq!(finding.status, expected, "{value} {is_root}");
        }
    }

    #[test]
    fn what_trying_io_uring_came_to_is_told() {
        let probe = |mode, registered_files| Ok(Probe { mode, registered_files });
        let denied = io::Error::from(rustix::io::Errno::PERM);
        let absent = io::Error::from(rustix::io::Errno::NOSYS);
        let findings = [
            probe(Support::DeferTaskrun, true),
            probe(Support::DeferTaskrun, false),
            probe(Support::CoopTaskrun, true),
            Err(denied),
            Err(absent),
        ]
        .map(uring);
        let statuses = findings.each_ref().map(|finding| finding.status);
        use Status::{Limited, Missing, Ok as Fine};
        assert_eq!(statuses, [Fine, Limited, Limited, Missing, Missing]);
        assert!(findings[1].detail.ends_with("DEFER_TASKRUN and plain files"));
        assert!(findings[3].advice.as_ref().is_some_and(|advice| advice.contains("seccomp")));
        assert!(findings[4].detail.contains("os error 38"), "{:?}", findings[4]);
    }

    #[test]
    fn what_trying_devices_came_to_is_told() {
        let refused = || sheave_core::Error::new(sheave_core::ErrorKind::Unsupported, "ublk", "no");
        let statuses = [ublk(Some(Ok(()))), ublk(Some(Err(refused()))), ublk(None)]
            .map(|finding| finding.status);
        assert_eq!(statuses, [Status::Ok, Status::Missing, Status::Unused]);
        let absent = nbd(Some(Err(refused())));
        assert!(absent.advice.is_some() && nbd(Some(Ok(()))).advice.is_none());
    }

    #[test]
    fn kernels_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        for (release, expected) in [
            ("4.19.0", Status::Missing),
            ("5.18.19", Status::Missing),
            ("5.19-rc1", Status::Limited),
            ("6.0.1", Status::Limited),
            ("6.12.43+deb13-amd64", Status::Limited),
            ("6.13", Status::Ok),
            ("10.0", Status::Ok),
            ("weird", Status::Limited),
        ] {
            let node = Node { release: release.to_owned(), ..node(root.path()) };
            assert_eq!(node.kernel().status, expected, "{release}");
        }
    }

    #[test]
    fn people_and_programs_can_read_a_finding() {
        let finding = Finding::missing("kernel TLS", "no tls", "`modprobe tls`");
        let text = lines(&finding, false);
        assert_eq!(
            text,
            "missing  kernel TLS      no tls\n                         → `modprobe tls`\n"
        );
        assert!(lines(&finding, true).starts_with("\x1b[31mmissing \x1b[0m "));
        let json = serde_json::to_value(Finding::ok("kernel", "Linux 6.1")).unwrap();
        let expected = serde_json::json!({"name": "kernel", "status": "ok", "detail": "Linux 6.1"});
        assert_eq!(json, expected);
    }
}
