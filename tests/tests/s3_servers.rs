//! The emulator of tests answers as S3 servers of others do.

use sheave_emulator::{Client, Emulator, Settings};
use sheave_tests::S3Server;

/// Requests with their headers and bodies, in order, and what every server answers: status, and
/// the code in the answer of a refusal.
type Case = (&'static str, &'static str, &'static [(&'static str, &'static str)], &'static [u8]);
const ABSENT: &[(&str, &str)] = &[("if-none-match", "*")];
const CASES: &[(Case, u16, &str)] = &[
    (("HEAD", "/volumes", &[], b""), 200, ""),
    (("HEAD", "/missing-bucket", &[], b""), 404, ""),
    (("GET", "/missing-bucket/x", &[], b""), 404, "NoSuchBucket"),
    (("GET", "/volumes/log/1", &[], b""), 404, "NoSuchKey"),
    (("HEAD", "/volumes/log/1", &[], b""), 404, ""),
    (("PUT", "/volumes/log/1", ABSENT, b"the first"), 200, ""),
    (("PUT", "/volumes/log/1", ABSENT, b"the second"), 412, "PreconditionFailed"),
    (("PUT", "/volumes/log/2", ABSENT, b"another"), 200, ""),
    (("PUT", "/volumes/root/1", ABSENT, b""), 200, ""),
    (("GET", "/volumes/log/1", &[], b""), 200, ""),
    (("GET", "/volumes/log/1", &[("range", "bytes=4-100")], b""), 206, ""),
    (("GET", "/volumes/log/1", &[("range", "bytes=0-2")], b""), 206, ""),
    (("GET", "/volumes/log/1", &[("range", "bytes=9-20")], b""), 416, "InvalidRange"),
    (("GET", "/volumes?list-type=2&prefix=log%2F", &[], b""), 200, ""),
    (("GET", "/volumes?list-type=2&prefix=log%2F&start-after=log%2F1", &[], b""), 200, ""),
    (("GET", "/volumes?list-type=2&prefix=log%2F&max-keys=1", &[], b""), 200, ""),
    (("GET", "/missing-bucket?list-type=2", &[], b""), 404, "NoSuchBucket"),
    (("DELETE", "/volumes/log/1", &[], b""), 204, ""),
    (("DELETE", "/volumes/log/1", &[], b""), 204, ""),
    (("GET", "/volumes/log/1", &[], b""), 404, "NoSuchKey"),
    (("PUT", "/volumes/log/1", ABSENT, b"the third"), 200, ""),
];

/// What stands between the tags of this name, each time.
fn all(text: &str, tag: &str) -> Vec<String> {
    let (begin, end) = (format!("<{tag}>"), format!("</{tag}>"));
    let parts = text.split(&begin).skip(1).filter_map(|rest| rest.split(&end).next());
    parts.map(str::to_owned).collect()
}

/// Sends all requests; returns the bodies of objects and the keys of lists.
fn answers(mut client: Client) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for ((method, target, headers, body), status, code) in CASES {
        let reply = client.send(method, target, headers, body).expect("an answer");
        let text = String::from_utf8(reply.body).expect("UTF-8");
        let shown = format!("{method} {target} {headers:?}: {} {text}", reply.status);
        assert_eq!(reply.status, *status, "{shown}");
        let codes = all(&text, "Code");
        assert_eq!(codes.first().map_or("", String::as_str), *code, "{shown}");
        if *method == "GET" && *status < 300 {
            let is_list = target.contains("list-type");
            found.push(if is_list {
                [all(&text, "Key"), all(&text, "IsTruncated")].concat()
            } else {
                vec![text]
            });
        }
    }
    found
}

fn expected() -> Vec<Vec<String>> {
    let lists: &[&[&str]] = &[
        &["the first"],
        &["first"],
        &["the"],
        &["log/1", "log/2", "false"],
        &["log/2", "false"],
        &["log/1", "true"],
    ];
    lists.iter().map(|list| list.iter().map(|&text| text.to_owned()).collect()).collect()
}

#[test]
fn emulator() {
    let store = Emulator::start(Settings::default(), "volumes");
    let client = Client::new(store.address(), store.settings().access);
    assert_eq!(answers(client), expected());
}

#[test]
fn versitygw() {
    let Some(server) = S3Server::versitygw("s3_servers::versitygw") else { return };
    assert_eq!(answers(server.client()), expected());
}

#[test]
fn moto() {
    let Some(server) = S3Server::moto("s3_servers::moto") else { return };
    assert_eq!(answers(server.client()), expected());
}

#[test]
fn s3s() {
    let Some(server) = S3Server::s3s("s3_servers::s3s") else { return };
    assert_eq!(answers(server.client()), expected());
}
