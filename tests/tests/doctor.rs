//! `sheave doctor URL`: what NBD servers offer, and what is wrong where none does.

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::thread;

use serde_json::Value;
use sheave_tests::{Certificates, Run, Scratch, Serve, have, sheave};

/// What is found of a server, by name.
fn findings(url: &str) -> Value {
    let output = Run::new(sheave()).args("doctor --json").arg(url).ok();
    let list: Value = serde_json::from_str(&output).expect("JSON");
    let findings = list.as_array().expect("a list").iter().map(|finding| {
        (finding["name"].as_str().expect("a name").to_owned(), finding["detail"].clone())
    });
    findings.collect::<serde_json::Map<_, _>>().into()
}

/// The one line that says why a server cannot be asked.
fn refused(url: &str) -> String {
    let message = Run::new(sheave()).arg("doctor").arg(url).fails();
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    message
}

#[test]
fn a_server_says_what_it_offers() {
    let scratch = Scratch::new();
    let image = scratch.sparse("disk.img", 3 << 20);
    let server = Serve::new(&image)
        .args("null:?size=1T --read-only --name disk --name void --description first")
        .args("--description second")
        .unix();
    let found = findings(&server.uri_of("disk"));
    assert_eq!(found["exports"], "2: \"disk\", \"void\"");
    let export = found["export"].as_str().expect("text");
    assert!(export.starts_with("\"disk\", 3145728 bytes (3.00 MiB), read-only"), "{export}");
    assert!(export.ends_with(", \"first\""), "{export}");
    assert!(found["replies"].as_str().expect("text").starts_with("extended"));
    assert_eq!(found["contexts"], "base:allocation");
    let commands = found["commands"].as_str().expect("text");
    assert!(commands.starts_with("flush") && commands.contains("not FUA, trim"), "{commands}");
    assert!(found["connections"].as_str().expect("text").contains("multi-conn"));
    let error = refused(&server.uri_of("nowhere"));
    assert!(error.contains("no such export"), "{error}");
    assert!(error.contains("it has \"disk\", \"void\""), "{error}");
}

#[test]
fn foreign_servers_say_what_they_offer() {
    assert!(have("qemu-nbd") && have("nbdkit"), "this test needs qemu-nbd and nbdkit installed");
    let scratch = Scratch::new();
    Run::new("qemu-img").args("create -q -f qcow2").arg(scratch.file("a.qcow2")).arg("5M").ok();
    let command = "nbd+exec:disk?command=qemu-nbd%20-f%20qcow2%20-A%20-x%20disk%20a.qcow2";
    let found = findings(&format!("{command}&directory={}", scratch.path().display()));
    assert!(found["replies"].as_str().expect("text").starts_with("structured"), "{found}");
    let contexts = found["contexts"].as_str().expect("text");
    assert_eq!(contexts, "base:allocation, qemu:allocation-depth");
    let found = findings("nbd+exec:?command=nbdkit%20--filter=nofilter%20null%2012345%20--no-sr");
    let export = found["export"].as_str().expect("text");
    assert!(export.contains("12345 bytes"), "{export}");
    assert_eq!(found["replies"], "simple");
    assert!(found["contexts"].as_str().expect("text").starts_with("none"), "{found}");
}

#[test]
fn what_is_wrong_is_one_line() {
    let error = refused("nbd+unix:///?socket=/no/such/socket");
    assert!(error.contains("No such file") && error.contains("is the server running"), "{error}");
    // Something else listens there.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in taken.incoming() {
            // The client goes away when it has read enough.
            let _ = stream.expect("a client").write_all(b"220 mail.example.org ESMTP\r\n");
        }
    });
    let error = refused(&format!("nbd://127.0.0.1:{port}/"));
    assert!(error.contains("does not speak NBD"), "{error}");
    let free = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port");
    let error = refused(&format!("nbd://{free}/"));
    assert!(error.contains("refused") && error.contains("is the server running"), "{error}");
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let error = refused(&format!("nbd://{}/", silent.local_addr().expect("an address")));
    assert!(error.contains("does not answer in time"), "{error}");
    let error = refused("nbd://no.such.host.invalid/");
    assert!(error.contains("no.such.host.invalid"), "{error}");
    let error = refused("/no/such/image");
    assert!(error.contains("is no NBD server"), "{error}");
    let error = refused("nbd+exec:?command=qemu-nbd%20/no/such/image");
    assert!(error.contains("/no/such/image") && error.contains("exit status: 1"), "{error}");
}

#[test]
fn encryption_is_told_and_bad_certificates_are_explained() {
    let certificates = Certificates::new();
    let server = Serve::new("memory:?size=1M").tls(&certificates, true).tcp();
    let nbds = |dir: &str| format!("nbds://localhost:{}/?tls-certificates={dir}", server.port());
    let dir = |certificates: &Certificates| certificates.dir().to_str().expect("UTF-8").to_owned();
    let found = findings(&nbds(&dir(&certificates)));
    let encryption = found["encryption"].as_str().expect("text");
    assert!(encryption.starts_with("TLS 1.3 with AES"), "{encryption}");
    let error = refused(&format!("nbd://localhost:{}/", server.port()));
    assert!(error.contains("it wants TLS: write nbds://"), "{error}");
    // A client of another authority, and a server of another authority.
    let stranger = certificates.stranger();
    let error = refused(&nbds(&dir(&stranger)));
    assert!(error.contains("certificate") || error.contains("UnknownCA"), "{error}");
    let error = refused(&nbds(&dir(&Certificates::new())));
    assert!(error.contains("certificate"), "{error}");
    let error = refused(&nbds("/no/such/directory"));
    assert!(error.contains("/no/such/directory/ca-cert.pem"), "{error}");
}

#[test]
fn a_program_that_was_started_ends_with_the_command() {
    let scratch = Scratch::new();
    let pid = scratch.file("pid");
    let command = format!("sh -c 'echo $$ >{pid}; exec nbdkit null 1M'");
    findings(&format!("nbd+exec:?command={}", command.replace(' ', "%20")));
    let pid = fs::read_to_string(pid).expect("the program ran");
    let process = format!("/proc/{}", pid.trim());
    // It was waited for, so there is no zombie either.
    assert!(!fs::exists(&process).expect("/proc"), "{process} is there");
}
