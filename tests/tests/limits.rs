//! Limits of the process, and sockets that a service manager passes.

use std::io::Read;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sheave_tests::{Bystander, Run, Scratch, Serve, sheave};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs the server with this limit of open files, soft and hard.
fn open_files(serve: Serve, limit: &str) -> Serve {
    let script = format!("ulimit -n {limit}; exec \"$@\"");
    serve.through(&["sh", "-c", &script, "sh"])
}

#[test]
fn with_a_full_table_clients_are_closed_and_the_log_is_quiet() {
    let server = open_files(Serve::new("memory:?size=8M").args("--shards 1"), "48").unix();
    let mut clients: Vec<_> =
        (0..100).map(|_| UnixStream::connect(server.socket()).expect("connect")).collect();
    // Each is greeted or closed; none is left hanging.
    let mut closed = 0;
    for client in &mut clients {
        client.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
        match client.read(&mut [0; 18]) {
            Ok(0) => closed += 1,
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    assert!(closed > 0, "100 clients with 48 descriptors");
    let lines = server.log().matches("cannot accept").count();
    assert!((1..=2).contains(&lines), "{lines} lines\n{}", server.log());
    drop(clients);
    let mut server = server;
    Bystander::new(&server).check(&mut server);
}

#[test]
fn shards_that_cannot_all_have_a_ring_give_way_to_threads() {
    let serve = Serve::new("memory:?size=8M").args("--shards 16");
    let mut server = open_files(serve, "40").unix();
    Bystander::new(&server).check(&mut server);
    let log = server.log();
    let is_told = log.contains("threads (no io_uring") && log.contains("RLIMIT_NOFILE is 40");
    assert!(is_told || log.contains("threads (no io_uring here"), "{log}");
}

#[test]
fn the_soft_limit_of_open_files_is_raised() {
    let script = "ulimit -Sn 64; ulimit -Hn 512; exec \"$@\"";
    let server = Serve::new("null:?size=1M").through(&["sh", "-c", script, "sh"]).unix();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).expect("proc");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    assert_eq!(line.split_whitespace().nth(3), Some("512"), "{line}");
}

#[test]
fn a_thousand_exports_start_soon_and_stay_small() {
    const EXPORTS: usize = 1000;
    /// Resident; 40 MiB are promised of a release build, and debug builds keep no more.
    const RSS_KIB_MAX: u64 = 40 << 10;
    let scratch = Scratch::new();
    let images = (0..EXPORTS).map(|index| {
        let path = scratch.file(&format!("{index}.img"));
        let image = std::fs::File::create(&path).expect("a file");
        image.set_len(1 << 20).expect("a size");
        path
    });
    let images: Vec<String> = images.collect();
    let begun = Instant::now();
    let mut server = Serve::new(&images[0]).args(&images[1..].join(" ")).unix();
    // One second is promised of a release build on an idle machine.
    assert!(begun.elapsed() < TIMEOUT, "{:?}", begun.elapsed());
    assert!(server.rss_kib() <= RSS_KIB_MAX, "{} KiB", server.rss_kib());
    assert!(server.fds() < 8 * EXPORTS, "{} descriptors", server.fds());
    server.wait_for_log("and 990 more", 1);
    assert!(server.interrupt().success());
}

#[test]
fn one_of_many_files_that_another_program_writes_to_is_named() {
    let scratch = Scratch::new();
    let paths = ["a.img", "b.img", "c.img"].map(|name| scratch.filled(name, 4096));
    // A program that locks nothing, and whose parent is not the server's.
    let script = format!("exec 3<>'{}'; echo open; exec sleep 60", paths[1]);
    let mut writer =
        Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().expect("sh");
    writer.stdout.take().expect("piped").read_exact(&mut [0; 5]).expect("it is open");
    let error = Run::new(sheave()).args(&format!("serve {}", paths.join(" "))).fails();
    assert!(error.contains("b.img: sleep (pid "), "{error}");
    assert!(error.contains("has it open for writing"), "{error}");
    writer.kill().expect("our own child");
    writer.wait().expect("our own child");
}

/// What the command says when it gets this socket from a service manager.
fn passed(command: &str, socket: OwnedFd) -> String {
    let scratch = Scratch::new();
    // The first socket that a manager passes is number 3.
    let pass = "exec 3<&0 </dev/null; LISTEN_FDS=1 exec timeout 60 \"$@\"";
    let output = Command::new("sh")
        .args(["-c", pass, "sh"])
        .arg(sheave())
        .args(command.split_whitespace())
        .env("SHEAVE_RUNTIME_DIR", scratch.path())
        .env_remove("LISTEN_PID")
        .stdin(Stdio::from(socket))
        .output()
        .expect("sh");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn passed_sockets_that_cannot_be_accepted_from_are_refused_with_advice() {
    for command in ["serve null:?size=1M", "daemon"] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connect");
        let said = passed(command, client.into());
        assert!(said.contains("socket 1 passed by the service manager"), "{command}: {said}");
        assert!(said.contains("set Accept=no in the socket unit"), "{command}: {said}");

        let (one, _other) = UnixStream::pair().expect("a pair");
        let said = passed(command, one.into());
        assert!(said.contains("set Accept=no in the socket unit"), "{command}: {said}");

        let datagrams = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let said = passed(command, datagrams.into());
        assert!(said.contains("not ListenDatagram="), "{command}: {said}");
    }
    let idle = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    );
    let said = passed("serve null:?size=1M", idle.expect("a socket"));
    assert!(said.contains("it does not listen"), "{said}");
}

#[test]
fn a_health_check_is_no_line_of_the_log() {
    let server = Serve::new("memory:?size=8M").tcp();
    for linger in [true, false].repeat(20) {
        let check = TcpStream::connect(("127.0.0.1", server.port())).expect("connect");
        if linger {
            // A reset instead of an end.
            rustix::net::sockopt::set_socket_linger(&check, Some(Duration::ZERO)).expect("linger");
        }
    }
    let mut server = server;
    Bystander::new(&server).check(&mut server);
    assert!(!server.log().contains("handshake"), "{}", server.log());
}
