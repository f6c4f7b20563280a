//! Calls a volume plugin as Docker does: HTTP/1.1 on its socket, a JSON object each way.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Run, eventually, sheave};

/// Docker waits so long.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A plugin of this node. However the test ends, it ends with it.
#[derive(Debug)]
pub struct DockerPlugin {
    child: Child,
    socket: PathBuf,
    dir: PathBuf,
    args: Vec<String>,
    /// The socket that a service manager has, and passes to it.
    passed: Option<UnixListener>,
}

impl DockerPlugin {
    /// Starts a plugin whose daemon and state are in this directory; waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    #[track_caller]
    pub fn start(dir: &Path, args: &[&str]) -> Self {
        Self::start_at(dir, dir, args)
    }

    /// The same with its socket `sheave.sock` in another directory.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    #[track_caller]
    pub fn start_at(sockets: &Path, dir: &Path, args: &[&str]) -> Self {
        let args: Vec<_> = args.iter().map(|&arg| arg.to_owned()).collect();
        let socket = sockets.join("sheave.sock");
        let child = spawn(dir, &socket, &args, None);
        let mut plugin = Self { child, socket, dir: dir.to_owned(), args, passed: None };
        plugin.wait_until_ready();
        plugin
    }

    /// Starts one with the socket `sheave.sock` of a service manager. Calls wait for it.
    ///
    /// # Panics
    /// When the socket cannot be made.
    #[must_use]
    pub fn start_passed(dir: &Path, args: &[&str]) -> Self {
        let args: Vec<_> = args.iter().map(|&arg| arg.to_owned()).collect();
        let socket = dir.join("sheave.sock");
        let passed = Some(UnixListener::bind(&socket).expect("a socket"));
        // It would be made there otherwise.
        let child = spawn(dir, &dir.join("not-passed.sock"), &args, passed.as_ref());
        Self { child, socket, dir: dir.to_owned(), args, passed }
    }

    /// A plugin of another node, which reaches the same pools.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    #[track_caller]
    pub fn start_on_another_node(dir: &Path, args: &[&str]) -> Self {
        let other = dir.join("other");
        fs::create_dir(&other).expect("a directory");
        std::os::unix::fs::symlink(dir.join("control.sock"), other.join("control.sock"))
            .expect("a link");
        Self::start(&other, args)
    }

    /// Starts one that listens on TCP with TLS, and returns its port, too.
    ///
    /// # Panics
    /// When it does not say that it is ready.
    #[must_use]
    #[track_caller]
    pub fn start_with_tls(dir: &Path, args: &[String]) -> (Self, u16) {
        let mut args = args.to_owned();
        args.extend(["--listen", "127.0.0.1:0"].map(str::to_owned));
        let socket = dir.join("sheave.sock");
        let child = spawn(dir, &socket, &args, None);
        let plugin = Self { child, socket, dir: dir.to_owned(), args, passed: None };
        let mut port = None;
        let is_ready = eventually(|| {
            let log = plugin.log();
            let address = log.split("address=127.0.0.1:").nth(1);
            let digits = address.and_then(|rest| rest.split(char::is_whitespace).next());
            port = digits.and_then(|digits| digits.parse().ok());
            port.is_some()
        });
        assert!(is_ready, "it does not start:\n{}", plugin.log());
        (plugin, port.expect("a port"))
    }

    /// Kills it and starts it again.
    ///
    /// # Panics
    /// When it does not answer.
    #[track_caller]
    pub fn restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// Starts it again after [`Self::kill`].
    ///
    /// # Panics
    /// When it does not answer.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.child = spawn(&self.dir, &self.socket, &self.args, self.passed.as_ref());
        self.wait_until_ready();
    }

    /// Kills it, and waits until it is gone.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn kill(&mut self) {
        drop(self.child.kill());
        self.child.wait().expect("our own child");
    }

    /// Ends it in order, and waits until it is gone.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn end(&mut self) {
        Run::new("kill").args("-TERM").arg(self.pid().to_string()).ok();
        let has_ended = eventually(|| matches!(self.child.try_wait(), Ok(Some(_))));
        assert!(has_ended, "it does not end:\n{}", self.log());
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged since its last start.
    ///
    /// # Panics
    /// When its log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("docker.log")).expect("log file")
    }

    #[track_caller]
    fn wait_until_ready(&mut self) {
        let mut is_ready = false;
        let answered = eventually(|| {
            is_ready = UnixStream::connect(&self.socket).is_ok();
            is_ready || matches!(self.child.try_wait(), Ok(Some(_)))
        });
        assert!(answered && is_ready, "it does not start:\n{}", self.log());
    }

    /// A call without checks: the status and the body of the answer, if there is one.
    #[must_use]
    pub fn post(&self, path: &str, body: &str) -> Option<(u16, String)> {
        Self::post_to(&self.socket, path, body)
    }

    /// The same to a plugin that listens there.
    ///
    /// # Panics
    /// When this process has no sockets.
    #[must_use]
    pub fn post_to(socket: &Path, path: &str, body: &str) -> Option<(u16, String)> {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).expect("a time limit");
        let len = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: plugin\r\nContent-Length: {len}\r\n\
             Accept: application/vnd.docker.plugins.v1.2+json\r\nConnection: close\r\n\r\n"
        );
        stream.write_all((head + body).as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    /// Mounts a volume for a process that ends with its call, as a dockerd that is killed. Needs
    /// curl.
    ///
    /// # Panics
    /// When that fails.
    pub fn mount_by_another(&self, name: &str, id: &str) -> PathBuf {
        Self::mount_at_by_another(&self.socket, name, id)
    }

    /// The same by a plugin that listens there.
    ///
    /// # Panics
    /// When that fails.
    pub fn mount_at_by_another(socket: &Path, name: &str, id: &str) -> PathBuf {
        let call = json!({ "Name": name, "ID": id }).to_string();
        let curl = Run::new("curl").args("--silent --fail --max-time 120 --unix-socket");
        let curl = curl.arg(socket).arg("--data").arg(call);
        let answer = curl.arg("http://plugin/VolumeDriver.Mount").ok();
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        answer["Mountpoint"].as_str().expect("a path").into()
    }

    /// Begins a mount. The caller leaves when what is returned is dropped.
    ///
    /// # Errors
    /// When the plugin does not take the call.
    pub fn begin_mount(&self, name: &str, id: &str) -> io::Result<UnixStream> {
        let body = json!({ "Name": name, "ID": id }).to_string();
        let len = body.len();
        let head = format!(
            "POST /VolumeDriver.Mount HTTP/1.1\r\nHost: plugin\r\nContent-Length: {len}\r\n\r\n"
        );
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.write_all((head + &body).as_bytes())?;
        Ok(stream)
    }

    /// A call, as Docker takes its answer.
    ///
    /// # Errors
    /// `Err` of the answer.
    ///
    /// # Panics
    /// When the answer is none of the protocol.
    #[track_caller]
    pub fn call(&self, path: &str, body: &Value) -> Result<Value, String> {
        let Some((status, body)) = self.post(path, &body.to_string()) else {
            return Err("no answer".to_owned());
        };
        let answer: Value =
            serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"));
        let error = answer["Err"].as_str().unwrap_or_else(|| panic!("{path}: no Err: {body}"));
        assert_eq!(status == 200, error.is_empty(), "{path}: {status} {body}");
        if error.is_empty() { Ok(answer) } else { Err(error.to_owned()) }
    }

    /// `docker volume create`.
    ///
    /// # Errors
    /// What the plugin says.
    #[track_caller]
    pub fn create(&self, name: &str, options: &[(&str, &str)]) -> Result<(), String> {
        let options: serde_json::Map<_, _> =
            options.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
        let body = json!({ "Name": name, "Opts": options });
        self.call("/VolumeDriver.Create", &body).map(drop)
    }

    /// What `docker run` calls for a container with this id.
    ///
    /// # Errors
    /// What the plugin says.
    #[track_caller]
    pub fn mount(&self, name: &str, id: &str) -> Result<PathBuf, String> {
        let answer = self.call("/VolumeDriver.Mount", &json!({ "Name": name, "ID": id }))?;
        Ok(answer["Mountpoint"].as_str().expect("a path").into())
    }

    /// What the end of a container calls.
    ///
    /// # Errors
    /// What the plugin says.
    #[track_caller]
    pub fn unmount(&self, name: &str, id: &str) -> Result<(), String> {
        self.call("/VolumeDriver.Unmount", &json!({ "Name": name, "ID": id })).map(drop)
    }

    /// `docker volume rm`.
    ///
    /// # Errors
    /// What the plugin says.
    #[track_caller]
    pub fn remove(&self, name: &str) -> Result<(), String> {
        self.call("/VolumeDriver.Remove", &json!({ "Name": name })).map(drop)
    }

    /// `docker volume inspect`.
    ///
    /// # Errors
    /// What the plugin says.
    #[track_caller]
    pub fn get(&self, name: &str) -> Result<Value, String> {
        Ok(self.call("/VolumeDriver.Get", &json!({ "Name": name }))?["Volume"].clone())
    }
}

impl Drop for DockerPlugin {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn spawn(dir: &Path, socket: &Path, args: &[String], passed: Option<&UnixListener>) -> Child {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).stdin(Stdio::null());
    if let Some(listener) = passed {
        // The first socket that a manager passes is number 3.
        let pass = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\"";
        command.args(["sh", "-c", pass]);
        command.stdin(OwnedFd::from(listener.try_clone().expect("a descriptor")));
    }
    command.arg(sheave()).arg("docker-plugin").arg("--socket").arg(socket).args(args);
    command.env("SHEAVE_RUNTIME_DIR", dir).env("SHEAVE_STATE_DIR", dir);
    command.env("SHEAVE_LOG", "trace");
    command.stderr(File::create(dir.join("docker.log")).expect("log file"));
    command.spawn().expect("setpriv (util-linux)")
}
