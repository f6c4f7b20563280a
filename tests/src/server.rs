//! A running `sheave serve`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::command::wait;
use crate::{Certificates, PATIENCE, Run, Scratch, note, sheave};

/// Names the directory in which `sheave stats` finds a server. Each has its own here.
const RUNTIME_DIR: &str = "SHEAVE_RUNTIME_DIR";

const LOG_LINES_SHOWN: usize = 30;

/// How to start a server.
#[derive(Clone, Debug)]
pub struct Serve {
    args: Vec<OsString>,
    wrapper: Vec<String>,
    log_level: String,
    log_to: Option<Arc<OwnedFd>>,
    env: Vec<(String, OsString)>,
}

/// A server on a unix socket or a TCP port. Dropping it ends it and checks that it ended well.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: Address,
    log: PathBuf,
    scratch: Scratch,
    ended: bool,
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Serve {
    /// Serves one volume.
    #[must_use]
    pub fn new(volume: impl AsRef<OsStr>) -> Self {
        Self {
            args: vec![volume.as_ref().to_owned()],
            wrapper: Vec::new(),
            log_level: String::new(),
            log_to: None,
            env: Vec::new(),
        }
    }

    /// Serves what a configuration file says.
    #[must_use]
    pub fn configured(config: &str) -> Self {
        Self { args: vec!["--config".into(), config.into()], ..Self::new("") }
    }

    /// Adds arguments, divided at white space.
    #[must_use]
    pub fn args(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(OsString::from));
        self
    }

    /// Adds one argument as it is.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Chooses the engine.
    #[must_use]
    pub fn engine(self, engine: &str) -> Self {
        self.args("--engine").args(engine)
    }

    /// TLS; with `mutual`, clients need a certificate.
    #[must_use]
    pub fn tls(mut self, certificates: &Certificates, mutual: bool) -> Self {
        let args = if mutual { certificates.mutual_args() } else { certificates.server_args() };
        self.args.extend(args.into_iter().map(OsString::from));
        self
    }

    /// Runs the server through another command, which must `exec` it.
    #[must_use]
    pub fn through(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Chooses what it logs.
    #[must_use]
    pub fn log_level(self, level: &str) -> Self {
        Self { log_level: level.to_owned(), ..self }
    }

    /// Sends its log there, in place of the file that [`Server::log`] reads.
    #[must_use]
    pub fn log_to(self, fd: impl Into<OwnedFd>) -> Self {
        Self { log_to: Some(Arc::new(fd.into())), ..self }
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts it on a unix socket and waits until it accepts.
    #[must_use]
    pub fn unix(&self) -> Server {
        self.unix_named("s")
    }

    /// Like [`Self::unix`], on a socket of this name.
    #[must_use]
    pub fn unix_named(&self, name: impl AsRef<OsStr>) -> Server {
        let scratch = Scratch::new();
        let socket = scratch.path().join(name.as_ref());
        let args = ["--socket".into(), socket.clone().into_os_string()];
        self.start(&args, Address::Unix(socket), scratch)
            .unwrap_or_else(|log| panic!("{:?} did not start:\n{log}", self.args))
    }

    /// Starts it on a free TCP port of the loopback interface and waits until it accepts.
    #[must_use]
    pub fn tcp(&self) -> Server {
        // The kernel chooses: a port that a test chose could be taken by another before its use.
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let args = ["--listen".into(), address.to_string().into()];
        self.start(&args, Address::Tcp(address), Scratch::new())
            .unwrap_or_else(|log| panic!("{:?} did not start:\n{log}", self.args))
    }

    fn start(&self, listen: &[OsString], to: Address, scratch: Scratch) -> Result<Server, String> {
        let log = scratch.path().join("log");
        let stdout = File::create(&log).expect("log file");
        let stderr = match &self.log_to {
            Some(fd) => fd.try_clone().expect("a descriptor"),
            None => stdout.try_clone().expect("log file").into(),
        };
        // However the test ends, its server ends with it.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(&self.wrapper)
            .arg(sheave())
            .arg("serve")
            .args(&self.args)
            .args(listen)
            .env(RUNTIME_DIR, scratch.path())
            .env("SHEAVE_LOG", &self.log_level)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .expect("setpriv (util-linux)");
        let mut server = Server { child, address: to, log, scratch, ended: false };
        match server.wait_until_it_accepts() {
            Ok(()) => Ok(server),
            Err(why) => {
                server.ended = true;
                server.child.kill().expect("our own child");
                server.child.wait().expect("our own child");
                Err(format!("{why}\n{}", server.log()))
            }
        }
    }
}

impl Server {
    /// The URI of a single export.
    #[must_use]
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// An export's URI.
    #[must_use]
    pub fn uri_of(&self, export: &str) -> String {
        match &self.address {
            Address::Unix(socket) => {
                format!("nbd+unix:///{export}?socket={}", socket.display())
            }
            Address::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }

    /// The unix socket.
    ///
    /// # Panics
    /// When it listens on TCP.
    #[must_use]
    pub fn socket(&self) -> &str {
        match &self.address {
            Address::Unix(socket) => socket.to_str().expect("UTF-8 path"),
            Address::Tcp(address) => panic!("listens on {address}"),
        }
    }

    /// The TCP port.
    ///
    /// # Panics
    /// When it listens on a unix socket.
    #[must_use]
    pub fn port(&self) -> u16 {
        match &self.address {
            Address::Unix(socket) => panic!("listens on {}", socket.display()),
            Address::Tcp(address) => address.port(),
        }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// A command of `sheave` that finds this server and no other.
    #[must_use]
    pub fn sheave(&self, command: &str) -> Run {
        Run::new(sheave()).args(command).env(RUNTIME_DIR, self.scratch.path())
    }

    /// A directory of its own, for files of the test.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// What it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("log file")).into_owned()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether its process runs.
    #[must_use]
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_none()
    }

    /// Resident memory in KiB.
    #[must_use]
    pub fn rss_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = fs::read_to_string(path).expect("the server runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("VmRSS in KiB")
    }

    /// Open file descriptors.
    #[must_use]
    pub fn fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the server runs").count()
    }

    /// Ends it as Ctrl-C does and returns its status.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn interrupt(&mut self) -> ExitStatus {
        self.end(Signal::INT)
    }

    /// Makes it read its configuration again and waits for what it says about it.
    ///
    /// # Panics
    /// When it says nothing.
    pub fn reload(&self) -> String {
        let is_about_it = |line: &&str| line.contains("eloaded");
        let before = self.log().lines().filter(is_about_it).count();
        self.signal(Signal::HUP);
        let start = Instant::now();
        loop {
            let log = self.log();
            if let Some(line) = log.lines().filter(is_about_it).nth(before) {
                return line.to_owned();
            }
            assert!(start.elapsed() < PATIENCE, "not reloaded:\n{log}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until its log has this text so many times.
    ///
    /// # Panics
    /// When it does not come to that.
    pub fn wait_for_log(&self, text: &str, times: usize) {
        let start = Instant::now();
        while self.log().matches(text).count() < times {
            assert!(start.elapsed() < PATIENCE, "no {text:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("our own child");
    }

    /// Ends it by a signal and returns its status.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.ended()
    }

    /// Waits until it has ended and returns its status.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn ended(&mut self) -> ExitStatus {
        self.ended = true;
        if let Some(status) = wait(&mut self.child, PATIENCE) {
            return status;
        }
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
        panic!("the server did not end within {PATIENCE:?} of a signal\n{}", self.log());
    }

    /// Kills it, as power loss does.
    pub fn kill(&mut self) {
        self.ended = true;
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }

    /// Connects once, where the server says that it listens.
    fn connect(&mut self) -> io::Result<()> {
        if let Address::Tcp(address) = &self.address
            && address.port() == 0
        {
            let found = listening(&self.log()).ok_or_else(|| io::Error::other("no address yet"));
            self.address = Address::Tcp(found?);
        }
        self.address.connect()
    }

    fn wait_until_it_accepts(&mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                return Err(format!("ended with {status}"));
            }
            let last = match self.connect() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if start.elapsed() > PATIENCE {
                return Err(format!("no connection after {PATIENCE:?}: {last}"));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines.len().saturating_sub(LOG_LINES_SHOWN);
            let ended = self.child.try_wait().expect("our own child");
            let state = ended.map_or_else(|| "it runs".to_owned(), |status| status.to_string());
            note(&format!("--- end of the server's log ({state})\n{}\n", lines[tail..].join("\n")));
            drop(self.child.kill());
            drop(self.child.wait());
            return;
        }
        if !self.ended {
            let status = self.end(Signal::TERM);
            assert!(status.success(), "the server ended with {status}\n{}", self.log());
        }
        assert!(!self.log().contains("panicked at"), "the server panicked\n{}", self.log());
    }
}

impl Address {
    fn connect(&self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => UnixStream::connect(socket).map(drop),
            Self::Tcp(address) => TcpStream::connect(address).map(drop),
        }
    }
}

/// The TCP address in the line of the log that a server begins with.
fn listening(log: &str) -> Option<SocketAddr> {
    let (listeners, _) = log.split_once("listener=\"")?.1.split_once('"')?;
    listeners.split(", ").find_map(|listener| listener.parse().ok())
}
