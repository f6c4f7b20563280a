//! Listening sockets.

use std::fs;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use sheave_core::ErrorKind;
use sheave_nbd::Listener;
use sheave_shard::EngineChoice;
use tempfile::TempDir;

use crate::support::{Client, Link, Setup, wait_until};

fn listen(path: &Path) -> sheave_core::Result<Listener> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    Listener::unix(path)
}

fn kind(path: &Path) -> ErrorKind {
    listen(path).map(|_| ()).unwrap_err().kind()
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced_and_none_else() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let listener = listen(&path).unwrap();
    assert_eq!(listener.name(), format!("unix:{}", path.display()));
    assert_eq!(kind(&path), ErrorKind::Busy);
    drop(listener);
    assert!(!path.exists(), "it is taken away at the end");

    fs::write(&path, "a file").unwrap();
    listen(&path).map(|_| ()).unwrap_err();
    assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
    assert_eq!(kind(&dir.path().join("no/such/place")), ErrorKind::NotFound);
}

/// Such as the system log's.
#[test]
fn a_socket_of_another_kind_is_left_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s");
    let other = UnixDatagram::bind(&path).unwrap();
    listen(&path).map(|_| ()).unwrap_err();
    UnixDatagram::unbound().unwrap().send_to(b"still there", &path).unwrap();
    assert_eq!(other.recv(&mut [0; 20]).unwrap(), 11);
}

#[test]
fn a_socket_of_somebody_else_in_its_place_stays() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s");
    let listener = listen(&path).unwrap();
    fs::rename(&path, dir.path().join("old")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(listener);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_tcp_client_that_falls_silent_is_asked_whether_it_is_there() {
    let server = Setup::new(EngineChoice::Threads, "memory:?size=1M").start();
    let client = Client::with(Link::tcp(server.address), Default::default());
    let port = format!(":{:04X}", server.address.port());
    wait_until("the timer of its questions runs", || {
        // Local address, remote address, state, queues, and which timer runs: 02 is that one.
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
            fields[1].ends_with(&port) && fields[3] == "01" && fields[5].starts_with("02:")
        })
    });
    drop(client);
}
