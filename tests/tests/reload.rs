//! Exports and certificates that change while clients are connected.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sheave_tests::{
    Certificates, Run, Scratch, Serve, Server, Wire, both_engines, cmd, eventually, opt, pattern,
    reply,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 64 << 10;

both_engines! {
    fn exports_come_go_and_are_renamed_beside_connections(engine) {
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        let stays = export("stays", &scratch.sparse("stays.img", 4 * MIB));
        let renamed = scratch.sparse("renamed.img", 4 * MIB);
        let gone = export("gone", "memory:?size=4M");
        config.write(&[&stays, &export("old", &renamed), &gone]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let busy = [Steady::new(&server, "stays"), Steady::new(&server, "old")];
        let mut ending = open(&server, "gone").expect("an export");
        assert_eq!(open_size(&server, "new").ok(), None);

        config.write(&[&stays, &export("now", &renamed), &export("new", "memory:?size=8M")]);
        let said = server.reload();
        assert!(said.contains("reloaded") && said.contains("ended_connections=1"), "{said}");
        assert!(ending.is_closed(), "a connection of an export that was removed");
        assert_eq!(open_size(&server, "new").expect("added"), 8 * MIB);
        assert_eq!(open_size(&server, "now").expect("renamed"), 4 * MIB);
        for name in ["gone", "old"] {
            let error = open_size(&server, name).expect_err(name).to_string();
            assert!(error.contains(&format!("{:#x}", reply::ERR_UNKNOWN)), "{name}: {error}");
        }
        assert_eq!(list(&server), ["stays", "now", "new"]);
        // What it has counted goes on under the new name.
        let counted = || server.sheave("stats").ok().contains("now: 1 connections");
        assert!(eventually(counted), "{}", server.sheave("stats").ok());
        for steady in busy {
            assert!(steady.rounds() > 0);
        }
    }

    fn names_that_change_hands_during_a_handshake_give_no_volume(engine) {
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        let [one, two] = ["one.img", "two.img"].map(|name| scratch.sparse(name, MIB));
        config.write(&[&export("a", &one), &export("b", &two)]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let mut wire = Wire::connect(&server).expect("connect");
        wire.handshake().expect("greeting");
        config.write(&[&export("b", &one), &export("a", &two)]);
        assert!(server.reload().contains("opened=0 closed=0 ended_connections=0"));
        let served = wire.go("a").and_then(|_| wire.read(0, 512)).is_ok();
        assert!(!served, "what is called b now");
        assert_eq!(open_size(&server, "a").expect("export"), MIB);
    }

    fn a_volume_that_has_grown_is_larger_for_new_clients(engine) {
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        let image = scratch.sparse("a.img", 4 * MIB);
        config.write(&[&export("a", &image)]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let before = Steady::new(&server, "a");
        File::options().write(true).open(&image).and_then(|f| f.set_len(8 * MIB)).expect("grow");
        assert!(server.reload().contains(" reloaded "));
        let mut wire = Wire::connect(&server).expect("connect");
        wire.handshake().expect("greeting");
        assert_eq!(wire.go("a").expect("export").size, 8 * MIB);
        let error = wire.write(7 * MIB, &pattern(BLOCK, 1)).expect("a reply");
        assert_eq!(error, 0, "behind the old end");
        let back = wire.read(7 * MIB, BLOCK as u32).expect("reply").expect("read");
        assert_eq!(back, pattern(BLOCK, 1));
        assert!(before.rounds() > 0);
    }

    fn limits_change_for_connections_that_wait_for_them(engine) {
        const READS: u64 = 200;
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        let export = export("a", "memory:?size=4M");
        config.write(&[&export, "limit_iops = 1\n"]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let mut wire = open(&server, "a").expect("export");
        for cookie in 0..READS {
            wire.request(cmd::READ, cookie, 0, 512).expect("send");
        }
        config.write(&[&export, "limit_iops = 1_000_000\n"]);
        assert!(server.reload().contains("opened=0 closed=0 ended_connections=0"));
        // At one a second the last would come after minutes.
        let start = Instant::now();
        for _ in 0..READS {
            let (error, _) = wire.any_simple_reply().expect("a reply");
            assert_eq!(error, 0);
            wire.receive_vec(512).expect("data");
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }

    fn another_volume_under_the_same_name_is_for_new_clients(engine) {
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        config.write(&[&export("a", "memory:?size=4M"), &export("b", "memory:?size=4M")]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let beside = Steady::new(&server, "b");
        let mut old = open(&server, "a").expect("export");
        config.write(&[&export("a", "memory:?size=16M"), &export("b", "memory:?size=4M")]);
        assert!(server.reload().contains("opened=1 closed=1 ended_connections=1"));
        assert!(old.is_closed());
        assert_eq!(open_size(&server, "a").expect("export"), 16 * MIB);
        assert!(beside.rounds() > 0);
    }

    fn what_is_wrong_changes_nothing(engine) {
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        let image = scratch.sparse("a.img", 4 * MIB);
        let good = export("a", &image);
        config.write(&[&good]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let busy = Steady::new(&server, "a");
        let new = export("new", "memory:?size=1M");
        let missing = export("b", &scratch.file("missing.img"));
        let twice = export("b", &format!("file://{image}"));
        for (exports, said) in [
            (vec![&new, "[[export]\n"], "serve.toml:"),
            (vec![&new, "shard = 1\n"], "unknown field"),
            (vec![&new, &good, &missing], "missing.img"),
            (vec![&new, &good, &twice], "has it open already"),
            (vec![&new, &good, &export("a", "memory:?size=1M")], "two volumes have this name"),
            (vec![&new, &good, "clients = [\"x\"]\n"], "no client shows a certificate"),
        ] {
            config.write(&exports);
            let line = server.reload();
            assert!(line.contains("ERROR") && line.contains("not reloaded"), "{line}");
            assert!(line.contains(said), "{said}: {line}");
            assert_eq!(list(&server), ["a"]);
        }
        fs::remove_file(&config.path).expect("remove");
        assert!(server.reload().contains("cannot read the configuration file"));
        config.write(&[&good, &new]);
        assert!(server.reload().contains(" reloaded "));
        assert_eq!(list(&server), ["a", "new"]);
        assert!(busy.rounds() > 0);
    }

    fn a_client_that_does_not_read_its_replies_does_not_keep_an_export(engine) {
        let scratch = Scratch::new();
        let config = Config::new(&scratch);
        let (image, other) = (scratch.sparse("a.img", 64 * MIB), export("b", "memory:?size=1M"));
        config.write(&[&export("a", &image), &other]);
        let server = Serve::configured(&config.path).engine(engine).unix();
        let mut stuck = open(&server, "a").expect("export");
        for cookie in 0..64 {
            stuck.request(0, cookie, 0, MIB as u32).expect("send");
        }
        // The first reply is longer than the socket has room for.
        stuck.receive::<16>().expect("its header");
        config.write(&[&other]);
        assert!(server.reload().contains("ended_connections=1"));
        server.wait_for_log("connections closed that took too long to end", 1);
        // Its volume is closed then, so that others can have it.
        assert!(eventually(|| is_free(&image)), "the image is free");
    }
}

#[test]
fn a_service_manager_is_told_when_a_reload_is_done() {
    let scratch = Scratch::new();
    let address = scratch.file("notify");
    let manager = UnixDatagram::bind(&address).expect("a socket");
    manager.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let told = || {
        let mut text = [0; 500];
        let count = manager.recv(&mut text).expect("a message");
        String::from_utf8_lossy(&text[..count]).lines().next().unwrap_or_default().to_owned()
    };
    let image = scratch.sparse("a.img", 4 * MIB);
    let variable = format!("NOTIFY_SOCKET={address}");
    // Without anything but a volume, too: it may have grown.
    let server = Serve::new(&image).through(&["env", &variable]).unix();
    assert_eq!(told(), "READY=1");
    File::options().write(true).open(&image).and_then(|f| f.set_len(8 * MIB)).expect("grow");
    assert!(server.reload().contains(" reloaded "));
    assert_eq!((told().as_str(), told().as_str()), ("RELOADING=1", "READY=1"));
    assert_eq!(open_size(&server, "").expect("the only one"), 8 * MIB);
    drop(server);
    assert_eq!(told(), "STOPPING=1");
}

#[test]
fn keys_that_need_a_restart_are_named() {
    let scratch = Scratch::new();
    let config = Config::new(&scratch);
    let export = export("a", "memory:?size=1M");
    config.write(&["shards = 1\n", &export]);
    let server = Serve::configured(&config.path).unix();
    config.write(&["shards = 2\npoll_us = 10\nlisten = \"127.0.0.1:0\"\n", &export]);
    assert!(server.reload().contains(" reloaded "));
    server.wait_for_log("a restart is needed for it: listen, shards, poll_us", 1);
}

#[test]
fn a_file_that_was_replaced_is_named() {
    let scratch = Scratch::new();
    let config = Config::new(&scratch);
    let (image, other) = (scratch.sparse("a.img", 4 * MIB), scratch.sparse("b.img", 8 * MIB));
    config.write(&[&export("a", &image)]);
    let server = Serve::configured(&config.path).unix();
    fs::rename(&other, &image).expect("rename");
    assert!(server.reload().contains(" reloaded "));
    server.wait_for_log("another file has the name by now", 1);
    assert_eq!(open_size(&server, "a").expect("the old one"), 4 * MIB);
}

#[test]
fn volumes_of_the_command_line_stay_beside_those_of_the_file() {
    let scratch = Scratch::new();
    let config = Config::new(&scratch);
    config.write(&[&export("a", "memory:?size=1M")]);
    let server = Serve::configured(&config.path).args("memory:?size=2M --name own").unix();
    let busy = Steady::new(&server, "own");
    config.write(&[]);
    assert!(server.reload().contains("exports=1"));
    assert_eq!(list(&server), ["own"]);
    assert_eq!(open_size(&server, "").expect("the only one"), 2 * MIB);
    assert!(busy.rounds() > 0);
}

#[test]
fn a_renewed_certificate_is_used_and_connections_live_through_it() {
    let certificates = Certificates::new();
    let server = Serve::new("memory:?size=4M").tls(&certificates, true).tcp();
    let steady = TlsSteady::new(&nbds(&server, &certificates, ""));
    let mut seen = vec![fingerprint(&server)];
    // Renewed files are found …
    certificates.renew_server();
    server.wait_for_log("new connections use them", 1);
    seen.push(fingerprint(&server));
    // … and a signal does not wait for that.
    certificates.renew_server();
    assert!(server.reload().contains(" reloaded "));
    seen.push(fingerprint(&server));
    assert!(seen[0] != seen[1] && seen[1] != seen[2], "{seen:?}");
    // A certificate without its key is given up after a while, and by a signal at once.
    let key = certificates.file("server-key.pem");
    let good = fs::read(&key).expect("key");
    fs::copy(certificates.file("client-key.pem"), &key).expect("copy");
    assert!(server.reload().contains("does not go with its key"));
    server.wait_for_log("are not used, the old ones are", 1);
    assert_eq!(fingerprint(&server), seen[2]);
    assert!(!server.log().contains("PRIVATE"));
    fs::write(&key, good).expect("write");
    assert!(steady.rounds() > 0);
}

#[test]
fn a_revoked_client_is_refused_once_the_list_says_so() {
    let certificates = Certificates::new();
    let other = certificates.client("other", None);
    certificates.revoke(&[]);
    let server = Serve::new("memory:?size=4M")
        .tls(&certificates, true)
        .args(&format!("--tls-client-crl {}", certificates.file("crl.pem")))
        .tcp();
    let (own, others) = (nbds(&server, &certificates, ""), nbds_in(&server, &other, ""));
    let steady = TlsSteady::new(&others);
    Run::new("nbdinfo").arg(&own).ok();
    certificates.revoke(&["other"]);
    server.wait_for_log("new connections use them", 1);
    Run::new("nbdinfo").arg(&others).fails();
    server.wait_for_log("Revoked", 1);
    Run::new("nbdinfo").arg(&own).ok();
    // An old list before it would be the only one that is looked at.
    let newest = fs::read_to_string(certificates.file("crl.pem")).expect("read");
    certificates.revoke(&[]);
    let old = fs::read_to_string(certificates.file("crl.pem")).expect("read");
    fs::write(certificates.file("crl.pem"), old + &newest).expect("write");
    let said = server.reload();
    assert!(said.contains("two lists of one authority (authority); keep only the"), "{said}");
    assert!(steady.rounds() > 0, "a connection is not ended by it");
}

/// A configuration file that is replaced as a whole.
struct Config {
    path: String,
}

impl Config {
    fn new(scratch: &Scratch) -> Self {
        Self { path: scratch.file("serve.toml") }
    }

    fn write(&self, parts: &[&str]) {
        let new = format!("{}.new", self.path);
        fs::write(&new, parts.concat()).and_then(|()| fs::rename(&new, &self.path)).expect("write");
    }
}

/// A client that writes a pattern, and reads and verifies it until it is asked for its rounds.
struct Steady {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<usize>,
}

impl Steady {
    fn new(server: &Server, name: &str) -> Self {
        let mut wire = open(server, name).expect("export");
        let data = pattern(BLOCK, 7);
        assert_eq!(wire.write(0, &data).expect("reply"), 0);
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Relaxed) {
                let read = wire.read(0, BLOCK as u32).expect("the connection goes on");
                assert!(read.expect("no error") == data, "round {rounds}");
                rounds += 1;
            }
            // Once more, after all that has changed.
            assert!(wire.read(0, BLOCK as u32).expect("a reply").expect("no error") == data);
            rounds + 1
        });
        Self { stop, thread }
    }

    fn rounds(self) -> usize {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("every read was right")
    }
}

/// The same over TLS.
struct TlsSteady {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl TlsSteady {
    fn new(uri: &str) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/steady.py");
        let mut child = Command::new("/usr/bin/python3")
            .args([script, uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        output.read_line(&mut line).expect("read");
        assert_eq!(line, "ready\n");
        Self { child, output }
    }

    fn rounds(mut self) -> usize {
        self.child.stdin.take().expect("piped").write_all(b"\n").expect("write");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read");
        assert!(self.child.wait().expect("our own child").success());
        line.trim().parse().expect("rounds")
    }
}

fn export(name: &str, volume: &str) -> String {
    format!("[[export]]\nname = \"{name}\"\nvolume = \"{volume}\"\n")
}

fn open(server: &Server, name: &str) -> std::io::Result<Wire> {
    let mut wire = Wire::connect(server)?;
    wire.handshake()?;
    wire.go(name)?;
    Ok(wire)
}

fn open_size(server: &Server, name: &str) -> std::io::Result<u64> {
    let mut wire = Wire::connect(server)?;
    wire.handshake()?;
    wire.go(name).map(|export| export.size)
}

/// The names that a client is shown.
fn list(server: &Server) -> Vec<String> {
    let mut wire = Wire::connect(server).expect("connect");
    wire.handshake().expect("greeting");
    wire.option(opt::LIST, &[]).expect("send");
    let mut names = Vec::new();
    loop {
        match wire.option_reply(opt::LIST).expect("a reply") {
            (reply::SERVER, data) => {
                let len = u32::from_be_bytes(data[..4].try_into().expect("4 bytes")) as usize;
                names.push(String::from_utf8(data[4..4 + len].to_vec()).expect("UTF-8"));
            }
            (reply::ACK, _) => return names,
            (kind, _) => panic!("{kind:#x}"),
        }
    }
}

/// Whether another process may open it for writing.
fn is_free(image: &str) -> bool {
    let file = File::options().read(true).write(true).open(image).expect("image");
    file.try_lock().is_ok()
}

fn nbds(server: &Server, certificates: &Certificates, export: &str) -> String {
    let (port, dir) = (server.port(), certificates.dir().display());
    format!("nbds://localhost:{port}/{export}?tls-certificates={dir}")
}

fn nbds_in(server: &Server, dir: &Scratch, export: &str) -> String {
    let (port, dir) = (server.port(), dir.path().display());
    format!("nbds://localhost:{port}/{export}?tls-certificates={dir}")
}

/// A hash of the certificate that the server shows now.
fn fingerprint(server: &Server) -> String {
    let script = "import socket, ssl, struct, sys, hashlib\n\
        s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.recv(18)\n\
        s.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 5, 0)); s.recv(20)\n\
        c = ssl._create_unverified_context()\n\
        print(hashlib.sha256(c.wrap_socket(s).getpeercert(True)).hexdigest())";
    Run::new("/usr/bin/python3").arg("-c").arg(script).arg(server.port().to_string()).ok()
}
