//! S3 servers of others, on free ports of the loopback interface.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use sheave_emulator::{Access, Client};

use crate::go::cache_dir;
use crate::{Bucket, PATIENCE, Run, Scratch, go_tool, have, skip};

const BUCKET: &str = "volumes";
const MOTO: &str = "moto[server]==5.2.5";
/// Its newest version that the oldest supported compiler builds.
const S3S_VERSION: &str = "0.14.1";
/// A cold installation, on a busy machine.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(1800);
/// Another process may have taken the port that was free.
const STARTS_MAX: usize = 5;

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct S3Server {
    child: Child,
    address: SocketAddr,
    _data: Scratch,
}

/// The arguments of a server for its port and directory.
type Args<'a> = &'a dyn Fn(u16, &str) -> String;

impl S3Server {
    /// versitygw, on a directory. `None` where there is no Go that builds it.
    #[must_use]
    pub fn versitygw(test: &str) -> Option<Self> {
        let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/s3");
        let program = go_tool(test, &module, "github.com/versity/versitygw/cmd/versitygw")?;
        let args = |port, dir: &str| {
            let Access { key, secret } = access();
            format!("--access {key} --secret {secret} --port 127.0.0.1:{port} posix {dir}")
        };
        Some(Self::start(&program, &args))
    }

    /// moto's server, which keeps objects in memory. `None` where it cannot be installed.
    #[must_use]
    pub fn moto(test: &str) -> Option<Self> {
        let venv = cache_dir().join("moto");
        let program = venv.join("bin/moto_server");
        if !program.exists() {
            if !have("python3") {
                skip(test, "no Python, which runs moto");
                return None;
            }
            Run::new("python3").args("-m venv").arg(&venv).timeout(INSTALL_TIMEOUT).ok();
            let pip = Run::new(venv.join("bin/pip")).args("install --quiet").arg(MOTO);
            pip.timeout(INSTALL_TIMEOUT).ok();
        }
        Some(Self::start(&program, &|port, _| format!("-H 127.0.0.1 -p {port}")))
    }

    /// s3s-fs, on a directory: it checks conditions, then acts. Building it takes minutes of a CPU,
    /// so it is used where `SHEAVE_S3_LONG` is set.
    #[must_use]
    pub fn s3s(test: &str) -> Option<Self> {
        if std::env::var_os("SHEAVE_S3_LONG").is_none() {
            skip(test, "s3s-fs is built and used where SHEAVE_S3_LONG is set");
            return None;
        }
        let root = cache_dir().join("s3s");
        let program = root.join("bin/s3s-fs");
        if !program.exists() {
            let install = Run::new("cargo").args("install --quiet --locked --features binary");
            let install = install.args("s3s-fs --version").arg(S3S_VERSION).arg("--root");
            install.arg(&root).timeout(INSTALL_TIMEOUT).ok();
        }
        let args = |port, dir: &str| {
            let Access { key, secret } = access();
            format!("--host 127.0.0.1 --port {port} --access-key {key} --secret-key {secret} {dir}")
        };
        Some(Self::start(&program, &args))
    }

    /// A bucket of it, which is made with the server.
    #[must_use]
    pub fn bucket(&self) -> Bucket {
        Bucket::new(&format!("http://{}", self.address), BUCKET, access())
    }

    /// A client of it.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(self.address, Some(access()))
    }

    fn start(program: &Path, args: Args<'_>) -> Self {
        for _ in 0..STARTS_MAX {
            if let Some(server) = Self::try_start(program, args) {
                return server;
            }
        }
        panic!("{} does not start", program.display());
    }

    /// `None` if it ended by itself.
    fn try_start(program: &Path, args: Args<'_>) -> Option<Self> {
        let data = Scratch::on_disk();
        let address = free_port();
        let args = args(address.port(), data.path().to_str().expect("UTF-8 path"));
        // However the test ends, its server ends with it.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv (util-linux)");
        let mut server = Self { child, address, _data: data };
        let begun = Instant::now();
        loop {
            if server.child.try_wait().expect("our own child").is_some() {
                return None;
            }
            let made = server.client().send("PUT", &format!("/{BUCKET}"), &[], b"");
            match made {
                Ok(reply) if reply.status == 200 => return Some(server),
                answer => {
                    assert!(begun.elapsed() < PATIENCE, "{}: {answer:?}", program.display());
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn access() -> Access {
    Access { key: "sheave-tests".to_owned(), secret: "not-a-secret".to_owned() }
}

fn free_port() -> SocketAddr {
    let any = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of the loopback");
    any.local_addr().expect("its address")
}
