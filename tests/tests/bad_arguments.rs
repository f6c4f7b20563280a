//! Command lines that cannot work: one clear line and the right exit code.

use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};

use sheave_tests::{Certificates, Run, Scratch, Serve, sheave};

const FAILED: i32 = 1;
const USAGE: i32 = 2;

#[test]
fn wrong_usage_is_told_with_code_2() {
    let wrong = [
        "",
        "no-such-command",
        "serve",
        "serve memory:?size=1M --no-such-flag",
        "serve memory:?size=1M --engine fast",
        "serve memory:?size=1M --shards 0",
        "serve memory:?size=1M --shards many",
        "serve memory:?size=1M --poll-us -1",
        "serve memory:?size=1M --socket /tmp/s --socket-mode 999",
        "serve memory:?size=1M --tls-cert cert.pem",
        "serve memory:?size=1M --tls-key key.pem",
        "copy memory:?size=1M",
        "volume set disk.img",
        "volume set disk.img --limit-bps many",
        "volume set disk.img --limit-iops 1K",
        "stats --no-such-flag",
        "bench run nbd://localhost/ --bs 0",
        "bench run nbd://localhost/ --seconds 0",
    ];
    for args in wrong {
        let output = Run::new(sheave()).args(args).output();
        assert_eq!(output.status.code(), Some(USAGE), "{}", output.describe());
        assert!(!output.stderr.is_empty(), "{args:?} says nothing");
    }
}

#[test]
fn as_many_names_as_volumes() {
    let output = Run::new(sheave()).args("serve memory:?size=1M --name a --name b").output();
    assert_eq!(output.status.code(), Some(USAGE), "{}", output.describe());
    assert!(output.stderr.contains("2 times for 1 volumes"), "{}", output.stderr);
    assert!(output.stderr.contains("Usage: sheave serve "), "{}", output.stderr);
}

#[test]
fn volumes_that_cannot_be_opened_are_named_on_one_line() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.file("directory")).expect("make a directory");
    let missing = scratch.file("missing.img");
    let wrong = [
        (missing.clone(), "missing.img"),
        (format!("file://{missing}"), "missing.img"),
        (scratch.file("directory"), "directory"),
    ];
    for (volume, named) in wrong {
        let error = fails(&scratch, &[&volume, "--socket", &scratch.file("s")]);
        assert!(error.contains(named), "{volume:?} does not name {named:?}: {error}");
    }
}

#[test]
fn what_is_no_volume_is_wrong_usage() {
    let wrong = [
        ("memory:", "size"),
        ("memory:?size=", "size"),
        ("memory:?size=-1", "size"),
        ("memory:?size=1Q", "1Q"),
        ("memory:?size=99999999999999999999", "size"),
        ("memory:?size=16E", "16E"),
        ("memory:?size=1M&colour=red", "colour"),
        ("gopher://example.com/disk", "gopher"),
        ("null:", "size"),
    ];
    for (volume, named) in wrong {
        let output = Run::new(sheave()).args("serve").arg(volume).output();
        assert_eq!(output.status.code(), Some(USAGE), "{}", output.describe());
        let told = &output.stderr;
        assert!(told.contains(named), "{volume:?} does not name {named:?}: {told}");
    }
}

#[test]
fn addresses_that_cannot_be_used_are_named_on_one_line() {
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("its address").to_string();
    let socket = scratch.file("socket");
    let _live = UnixListener::bind(&socket).expect("a socket");
    let long = format!("/tmp/{}", "s".repeat(200));
    let missing = scratch.file("missing/socket");
    let file = scratch.filled("file", 100);
    let directory = scratch.path().to_str().expect("UTF-8 path").to_owned();
    let wrong = [
        ["--listen", "nowhere", "write HOST:PORT"],
        ["--listen", "10809", "write HOST:PORT"],
        ["--listen", ":10809", "the host is missing"],
        ["--listen", "::1:10809", "in brackets"],
        ["--listen", "127.0.0.1:99999", "from 0 to 65535"],
        ["--listen", "192.0.2.1:10809", "no address of this machine"],
        ["--listen", &taken, "or 0 for a free one"],
        ["--socket", &long, "at most 107"],
        ["--socket", &missing, "its directory must exist"],
        // Another server listens there.
        ["--socket", &socket, "another server listens there"],
        // It must not be removed.
        ["--socket", &file, "exists and is no socket"],
        ["--socket", &directory, "exists and is no socket"],
    ];
    for [option, value, why] in wrong {
        let error = fails(&scratch, &["memory:?size=1M", option, value]);
        assert!(error.contains(value), "{value:?} is not named: {error}");
        assert!(error.contains(why), "{value:?} is not explained by {why:?}: {error}");
    }
    assert_eq!(std::fs::read(&file).expect("the file").len(), 100, "the file is untouched");
    UnixStream::connect(&socket).expect("the other server's socket is where it was");
}

#[test]
fn certificates_that_cannot_be_used_are_named_on_one_line() {
    let scratch = Scratch::new();
    let garbage = scratch.filled("garbage.pem", 1000);
    let missing = scratch.file("missing.pem");
    for (cert, key) in [(&missing, &missing), (&garbage, &garbage)] {
        let args =
            ["memory:?size=1M", "--listen", "127.0.0.1:0", "--tls-cert", cert, "--tls-key", key];
        let error = fails(&scratch, &args);
        assert!(error.contains(".pem"), "{error}");
    }
}

#[test]
fn servers_that_cannot_be_reached_are_named_on_one_line() {
    let scratch = Scratch::new();
    let image = scratch.filled("a.img", 1000);
    let server = Serve::new("memory:?size=1M").args("--name disk").unix();
    let socket = format!("nbd+unix:///?socket={}", scratch.file("nope.sock"));
    let other_name = server.uri().replacen("///", "///nope", 1);
    for (uri, told) in [(&socket, "is the server running?"), (&other_name, "no such export")] {
        for run in [
            Run::new(sheave()).args("copy").arg(&image).arg(uri),
            Run::new(sheave()).args("bench run").arg(uri),
        ] {
            let output = run.output();
            assert_eq!(output.status.code(), Some(FAILED), "{}", output.describe());
            assert_eq!(output.stderr.matches(told).count(), 1, "{}", output.stderr);
            assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
            assert!(output.stderr.contains(uri), "{}", output.stderr);
        }
    }
}

#[test]
fn what_is_wrong_with_a_certificate_is_told() {
    let good = Certificates::new();
    let other = Certificates::new();
    let scratch = Scratch::new();
    let openssl = |args: &str| Run::new("openssl").args(args).in_dir(scratch.path()).ok();
    // Without extensions, a request is signed as of version 1.
    openssl("req -newkey rsa:2048 -nodes -keyout v1-key.pem -out v1.csr -subj /CN=localhost");
    openssl("x509 -req -in v1.csr -signkey v1-key.pem -out v1.pem -days 2");
    let [v1, v1_key] = ["v1.pem", "v1-key.pem"].map(|name| scratch.file(name));
    let [cert, key] = ["server-cert.pem", "server-key.pem"].map(|name| good.file(name));
    let other_key = other.file("server-key.pem");
    let wrong: [(&[&str], &str); 3] = [
        (&["--tls-cert", &v1, "--tls-key", &v1_key], "X.509 version 1"),
        (&["--tls-cert", &cert, "--tls-key", &other_key], "does not go with its key"),
        (&["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &key], "--tls-client-ca"),
    ];
    for (args, why) in wrong {
        let error =
            fails(&scratch, &[&["memory:?size=1M", "--listen", "127.0.0.1:0"], args].concat());
        assert!(error.contains(why), "{args:?}: {error}");
        assert!(!error.contains("Other("), "{error}");
        assert_eq!(why.contains("its key"), error.contains("its key"), "{error}");
    }
}

#[test]
fn an_authority_in_place_of_a_server_is_told() {
    let certificates = Certificates::new();
    let cert = certificates.file("ca-cert.pem");
    let args = format!("--tls-cert {cert} --tls-key {}", certificates.file("ca-key.pem"));
    let server = Serve::new("memory:?size=1M").args(&args).tcp();
    let dir = certificates.dir().display();
    let uri = format!("nbds://localhost:{}/?tls-certificates={dir}", server.port());
    let error = Run::new(sheave())
        .args("copy --quiet")
        .arg(uri)
        .arg(server.scratch().file("out.img"))
        .fails();
    assert!(error.contains("basicConstraints=CA:false"), "{error}");
}

/// `sheave serve` fails with these arguments; returns its one line.
#[track_caller]
fn fails(scratch: &Scratch, args: &[&str]) -> String {
    let run = Run::new(sheave()).arg("serve").env("SHEAVE_RUNTIME_DIR", scratch.path());
    let output = args.iter().fold(run, |run, arg| run.arg(arg)).output();
    assert_eq!(output.status.code(), Some(FAILED), "{}", output.describe());
    assert_eq!(output.stderr.lines().count(), 1, "one line: {}", output.stderr);
    output.stderr
}
