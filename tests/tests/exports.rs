//! Which clients see which exports, where a server listens, and what it shows of its clients.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::Value;
use sheave_tests::{
    Certificates, Run, Scratch, Serve, Server, Wire, both_engines, eventually, opt, pattern, reply,
    sheave,
};

const BLOCK: usize = 64 << 10;
const MIB: u64 = 1 << 20;

both_engines! {
    fn clients_see_only_what_they_may_use(engine) {
        let certificates = Certificates::new();
        let scratch = Scratch::new();
        let [backup, host, stranger] = [
            certificates.client("backup", None),
            certificates.client("host", Some("a.example.com")),
            certificates.client("stranger", Some("a.b.example.com")),
        ];
        let config = scratch.file("serve.toml");
        let text = format!(
            "tls_cert = \"{}\"\ntls_key = \"{}\"\ntls_client_ca = \"{}\"\n\
             [[export]]\nname = \"one\"\nvolume = \"memory:?size=1M\"\nclients = [\"backup\"]\n\
             [[export]]\nname = \"two\"\nvolume = \"memory:?size=2M\"\n\
             clients = [\"BACKUP\", \"*.example.com\"]\n\
             [[export]]\nname = \"far\"\nvolume = \"memory:?size=4M\"\n\
             addresses = [\"192.0.2.0/24\"]\n",
            certificates.file("server-cert.pem"),
            certificates.file("server-key.pem"),
            certificates.file("ca-cert.pem"),
        );
        fs::write(&config, text).expect("write");
        let server = Serve::configured(&config).engine(engine).tcp();
        let seen = |dir: &Scratch| {
            let list = Run::new("nbdinfo").args("--list --json").arg(uri(&server, dir, "")).ok();
            let list: Value = serde_json::from_str(&list).expect("JSON");
            let names = list["exports"].as_array().expect("exports").iter();
            let name = |one: &Value| one["export-name"].as_str().expect("name").to_owned();
            names.map(name).collect::<Vec<_>>()
        };
        assert_eq!(seen(&backup), ["one", "two"]);
        assert_eq!(seen(&host), ["two"]);
        let size = |dir: &Scratch, name: &str| {
            Run::new("nbdinfo").arg("--size").arg(uri(&server, dir, name))
        };
        assert_eq!(size(&backup, "one").ok().trim(), "1048576");
        // The only one that it may use is its default.
        assert_eq!(size(&host, "").ok().trim(), "2097152");
        // What a client may not use is answered as what does not exist.
        for (dir, name) in [(&host, "one"), (&backup, "far"), (&stranger, "two"), (&backup, "")] {
            // The message without the name that was asked for.
            let refused = |name: &str| {
                let said = size(dir, name).fails();
                said.replace(&format!("/{name}?"), "/?").replace(&format!("'{name}'"), "''")
            };
            assert_eq!(refused(name), refused("absent"), "{name}");
        }
    }

    fn the_bound_on_connections_is_of_one_export(engine) {
        let scratch = Scratch::new();
        let config = scratch.file("serve.toml");
        let text = "[[export]]\nname = \"a\"\nvolume = \"memory:?size=1M\"\nconnections_max = 2\n\
                    [[export]]\nname = \"b\"\nvolume = \"memory:?size=1M\"\n";
        fs::write(&config, text).expect("write");
        let server = Serve::configured(&config).engine(engine).unix();
        let mut open: Vec<_> = (0..2).map(|_| go(&server, "a").expect("room")).collect();
        let refused = go(&server, "a").expect_err("no room").to_string();
        assert!(refused.contains(&format!("{:#x}", reply::ERR_POLICY)), "{refused}");
        go(&server, "b").expect("another export");
        // INFO tells about an export that has no room.
        let mut wire = Wire::connect(&server).expect("connect");
        wire.handshake().expect("greeting");
        wire.option(opt::INFO, &sheave_tests::go_data("a")).expect("send");
        assert_eq!(wire.option_reply(opt::INFO).expect("reply").0, reply::INFO);
        drop(open.pop());
        assert!(eventually(|| go(&server, "a").is_ok()), "room again");
    }

    fn clients_are_listed_with_what_they_have_moved(engine) {
        let scratch = Scratch::new();
        let config = scratch.file("serve.toml");
        let text = "[[export]]\nname = \"a\"\nvolume = \"memory:?size=1M\"\ndescription = \"one\"\n\
                    [[export]]\nname = \"b\\u001b[2J\"\nvolume = \"memory:?size=1M\"\n";
        fs::write(&config, text).expect("write");
        let server = Serve::configured(&config).engine(engine).unix();
        let mut wire = go(&server, "a").expect("export");
        assert_eq!(wire.write(0, &pattern(BLOCK, 1)).expect("reply"), 0);
        for _ in 0..3 {
            wire.read(0, BLOCK as u32).expect("reply").expect("read");
        }
        let exports = || -> Value {
            let text = server.sheave("exports --json").ok();
            serde_json::from_str::<Value>(&text).expect("JSON")[0]["exports"].take()
        };
        // Counted once the replies have been gathered, which is before they are sent.
        let listed = exports();
        assert_eq!(listed[0]["name"], "a");
        assert_eq!(listed[0]["description"], "one");
        assert_eq!(listed[0]["size_bytes"], MIB);
        let client = &listed[0]["clients"][0];
        let peer = client["peer"].as_str().expect("peer");
        assert!(peer.starts_with(&format!("unix:pid={},", std::process::id())), "{peer}");
        assert_eq!(client["certificate"], Value::Null);
        assert_eq!(client["bytes_read"], 3 * BLOCK);
        assert_eq!(client["bytes_written"], BLOCK);
        assert!(client["connected_ms"].as_u64().is_some_and(|ms| ms < 600_000));
        assert_eq!(listed[1]["clients"], Value::Array(Vec::new()));
        let table = server.sheave("exports").ok();
        assert!(table.contains("192.00 KiB") && table.contains("b\\u{1b}[2J"), "{table}");
        assert!(!table.contains('\u{1b}'));
        drop(wire);
        assert!(eventually(|| exports()[0]["clients"] == Value::Array(Vec::new())), "gone");
    }
}

#[test]
fn a_server_listens_wherever_it_is_told_to() {
    let scratch = Scratch::new();
    let sockets = ["s1", "s2"].map(|name| scratch.file(name));
    let args = format!(
        "--socket {} --socket {} --socket-mode 0620 --socket-group 0 --listen 127.0.0.1:0",
        sockets[0], sockets[1]
    );
    let server = Serve::new("memory:?size=1M").args(&args).unix();
    for socket in &sockets {
        let found = fs::symlink_metadata(socket).expect("a socket");
        assert!(found.file_type().is_socket());
        assert_eq!((found.permissions().mode() & 0o7777, found.gid()), (0o620, 0));
        Run::new("nbdinfo").arg(format!("nbd+unix:///?socket={socket}")).ok();
    }
    Run::new("nbdinfo").arg(server.uri()).ok();
    server.wait_for_log("listener=\"127.0.0.1:", 1);
    let log = server.log();
    let port = log.split("listener=\"127.0.0.1:").nth(1).and_then(|rest| rest.split('"').next());
    Run::new("nbdinfo").arg(format!("nbd://127.0.0.1:{}", port.expect("a port"))).ok();
    drop(server);
    assert!(sockets.iter().all(|socket| !Path::new(socket).exists()));
}

#[test]
fn socket_modes_and_groups_that_cannot_be_are_named() {
    let scratch = Scratch::new();
    let socket = scratch.file("s");
    for (args, code, said) in [
        ("--socket-mode 999", 2, "such as 0660"),
        ("--socket-mode 1777", 2, "such as 0660"),
        ("--socket-group no-such-group", 1, "there is no such group"),
        ("--tls-client-crl F", 2, "--tls-client-crl"),
        ("--tls-client-ca F", 2, "--tls-cert"),
        ("--tls-key F", 2, "--tls-cert"),
        ("--description a --description b", 2, "--description is given 2 times for 1 volumes"),
    ] {
        let run = Run::new(sheave()).args("serve memory:?size=1M --socket").arg(&socket);
        let output = run.args(args).env("SHEAVE_RUNTIME_DIR", scratch.path()).output();
        assert_eq!(output.status.code(), Some(code), "{}", output.describe());
        assert!(output.stderr.contains(said), "{}", output.describe());
        assert!(!Path::new(&socket).exists());
    }
}

#[test]
fn names_and_descriptions_are_as_long_as_the_protocol_allows() {
    for option in ["--name", "--description"] {
        let run = Run::new(sheave()).args("serve memory:?size=1M --listen 127.0.0.1:0").arg(option);
        let output = run.arg("é".repeat(2049)).output();
        assert_eq!(output.status.code(), Some(2), "{}", output.describe());
        assert!(output.stderr.contains("NBD has at most 4096"), "{}", output.stderr);
    }
    let name = "é".repeat(2048);
    let server = Serve::new("memory:?size=1M").args("--name").args(&name).unix();
    go(&server, &name).expect("the longest name");
}

#[test]
fn clients_are_told_what_the_description_says_and_no_paths() {
    let scratch = Scratch::new();
    let image = scratch.sparse("secret.img", 1 << 20);
    let list = |server: &Server| Run::new("nbdinfo").arg("--list").arg(server.uri()).ok();
    let server = Serve::new(format!("{image}?fault=read:error=EIO:after=1000")).unix();
    let told = list(&server);
    assert!(told.contains("secret.img"), "its name: {told}");
    for hidden in ["description", "fault", scratch.path().to_str().expect("UTF-8")] {
        assert!(!told.replace(server.socket(), "").contains(hidden), "{hidden}: {told}");
    }
    drop(server);
    let server = Serve::new(&image).args("--description nightly").unix();
    assert!(list(&server).contains("nightly"));
}

#[test]
fn keys_that_cannot_be_used_are_explained() {
    let certificates = Certificates::new();
    let scratch = Scratch::new();
    let openssl = |args: &str| Run::new("openssl").args(args).in_dir(scratch.path()).ok();
    let key = certificates.file("server-key.pem");
    openssl(&format!("pkcs8 -topk8 -in {key} -out pkcs8.pem -passout pass:secret"));
    openssl(&format!("ec -in {key} -out old.pem -aes128 -passout pass:secret"));
    openssl("req -x509 -newkey rsa:1024 -nodes -keyout short.pem -out short-cert.pem -subj /CN=x");
    openssl("rsa -in short.pem -traditional -out short1.pem");
    openssl(&format!("pkey -in {key} -outform DER -out key.der"));
    let cert = certificates.file("server-cert.pem");
    openssl(&format!("x509 -in {cert} -outform DER -out cert.der"));
    fs::write(scratch.file("empty.pem"), "\n").expect("write");
    fs::write(scratch.file("junk.pem"), "hello").expect("write");
    for (with_cert, with_key, said) in [
        (cert.as_str(), "pkcs8.pem", "has a passphrase, which a server cannot ask for"),
        (&cert, "old.pem", "openssl pkey -in"),
        (&cert, "short.pem", "an RSA key of 1024 bits; 2048 to 8192 are supported"),
        (&cert, "short1.pem", "an RSA key of 1024 bits"),
        (&cert, "empty.pem", "is empty"),
        (&cert, "junk.pem", "neither PEM nor DER"),
        (&cert, &cert, "a certificate; has it been mistaken for the key?"),
        (&key, &key, "a private key; has it been mistaken for the certificate?"),
    ] {
        let run = Run::new(sheave()).args("serve memory:?size=1M --listen 127.0.0.1:0");
        let run = run.arg("--tls-cert").arg(with_cert).arg("--tls-key").arg(with_key);
        let output = run.in_dir(scratch.path()).output();
        assert_eq!(output.status.code(), Some(1), "{}", output.describe());
        assert!(output.stderr.contains(said), "{said}: {}", output.stderr);
        assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    }
    let der =
        format!("--tls-cert {} --tls-key {}", scratch.file("cert.der"), scratch.file("key.der"));
    let server = Serve::new("memory:?size=1M").args(&der).tcp();
    Run::new("nbdinfo").arg(uri(&server, &certificates.without_client(), "")).ok();
}

fn go(server: &Server, name: &str) -> std::io::Result<Wire> {
    let mut wire = Wire::connect(server)?;
    wire.handshake()?;
    wire.go(name)?;
    Ok(wire)
}

fn uri(server: &Server, dir: &Scratch, export: &str) -> String {
    let (port, dir) = (server.port(), dir.path().display());
    format!("nbds://localhost:{port}/{export}?tls-certificates={dir}")
}
