//! The store, by a client of its own.

use std::net::SocketAddr;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use sheave_emulator::{
    Access, Client, Conditions, Effect, Emulator, Fault, Kind, Outage, Settings,
};

const BUCKET: &str = "b";

fn store() -> Emulator {
    Emulator::start(Settings::default(), BUCKET)
}

fn client(store: &Emulator) -> Client {
    Client::new(store.address(), store.settings().access)
}

fn status(client: &mut Client, method: &str, key: &str, headers: &[(&str, &str)]) -> u16 {
    client.send(method, &format!("/b/{key}"), headers, b"").expect("an answer").status
}

/// Puts an object, if there is none, and answers the status.
fn create(client: &mut Client, key: &str, body: &[u8]) -> u16 {
    let absent = [("if-none-match", "*")];
    client.send("PUT", &format!("/b/{key}"), &absent, body).expect("an answer").status
}

fn text(client: &mut Client, target: &str) -> String {
    let reply = client.send("GET", target, &[], b"").expect("an answer");
    String::from_utf8(reply.body).expect("UTF-8")
}

/// What stands between the tags of this name, each time.
fn all<'a>(text: &'a str, tag: &str) -> Vec<&'a str> {
    let (begin, end) = (format!("<{tag}>"), format!("</{tag}>"));
    text.split(&begin).skip(1).filter_map(|rest| rest.split(&end).next()).collect()
}

#[test]
fn objects_are_put_read_in_parts_and_deleted() {
    let store = store();
    let mut client = client(&store);
    let body: Vec<_> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(create(&mut client, "dir/a%20b", &body), 200);
    let whole = client.send("GET", "/b/dir/a%20b", &[], b"").expect("an answer");
    assert_eq!((whole.status, &whole.body), (200, &body));
    let part = [("range", "bytes=1000-1999")];
    let part = client.send("GET", "/b/dir/a%20b", &part, b"").expect("an answer");
    assert_eq!((part.status, &part.body[..]), (206, &body[1000..2000]));
    assert_eq!(part.headers["content-range"], "bytes 1000-1999/400000");
    let head = client.send("HEAD", "/b/dir/a%20b", &[], b"").expect("an answer");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.headers["content-length"], "400000");
    assert_eq!(status(&mut client, "GET", "dir/a%20b", &[("range", "bytes=400000-")]), 416);
    assert_eq!(status(&mut client, "DELETE", "dir/a%20b", &[]), 204);
    assert_eq!(status(&mut client, "DELETE", "dir/a%20b", &[]), 204);
    let gone = client.send("GET", "/b/dir/a%20b", &[], b"").expect("an answer");
    assert_eq!(gone.status, 404);
    assert_eq!(all(&String::from_utf8_lossy(&gone.body), "Code"), ["NoSuchKey"]);
    assert_eq!(all(&text(&mut client, "/none/x"), "Code"), ["NoSuchBucket"]);
    assert_eq!(client.send("PATCH", "/b/x", &[], b"").expect("an answer").status, 501);
    let counts = store.counts();
    assert_eq!((counts.of(Kind::Put).requests, counts.of(Kind::Put).bytes_in), (1, 400_000));
    assert_eq!(counts.of(Kind::Get).failed, 3);
    let connections: Vec<_> = store.log().iter().map(|record| record.connection).collect();
    assert_eq!(connections, vec![1; connections.len()], "one connection is kept");
}

#[test]
fn lists_come_in_parts_and_in_groups() {
    let store = store();
    let mut client = client(&store);
    for key in ["a", "log/1", "log/2", "log/3", "root/%26", "z"] {
        assert_eq!(create(&mut client, key, b"x"), 200);
    }
    let list = text(&mut client, "/b?list-type=2&prefix=log/&start-after=log/1");
    assert_eq!(all(&list, "Key"), ["log/2", "log/3"]);
    assert_eq!(all(&list, "IsTruncated"), ["false"]);
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let list = text(&mut client, &format!("/b/?list-type=2&max-keys=2{token}"));
        found.extend(all(&list, "Key").into_iter().map(str::to_owned));
        let Some(next) = all(&list, "NextContinuationToken").first().copied() else { break };
        token = format!("&continuation-token={}", next.replace('%', "%25"));
    }
    assert_eq!(found, ["a", "log/1", "log/2", "log/3", "root/&amp;", "z"]);
    let list = text(&mut client, "/b?list-type=2&delimiter=/&max-keys=2");
    assert_eq!((all(&list, "Key"), all(&list, "Prefix")), (vec!["a"], vec!["", "log/"]));
    let list = text(&mut client, "/b?list-type=2&delimiter=/&start-after=log/");
    assert_eq!((all(&list, "Key"), all(&list, "Prefix")), (vec!["z"], vec!["", "root/"]));
    let list = text(&mut client, "/b?marker=log/3&encoding-type=url");
    assert_eq!(all(&list, "Key"), ["root/%26", "z"]);
    let list = text(&mut client, "/b?list-type=2&max-keys=0");
    assert_eq!((all(&list, "Key").len(), all(&list, "IsTruncated")), (0, vec!["false"]));
    store.set(|settings| settings.list_delay = Duration::from_secs(3600));
    assert_eq!(create(&mut client, "new", b"x"), 200);
    assert!(all(&text(&mut client, "/b?list-type=2"), "Key").is_empty());
}

/// The statuses of many creations of one key at the same time.
fn race(store: &Emulator, key: &str) -> Vec<u16> {
    const CLIENTS: usize = 16;
    let barrier = Barrier::new(CLIENTS);
    let racing = || {
        let mut client = client(store);
        assert_eq!(status(&mut client, "HEAD", "connect", &[]), 404);
        barrier.wait();
        create(&mut client, key, b"mine")
    };
    thread::scope(|scope| {
        let racers: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(racing)).collect();
        racers.into_iter().map(|racer| racer.join().expect("an answer")).collect()
    })
}

#[test]
fn of_creations_at_the_same_time_one_succeeds_unless_the_store_is_bad() {
    let store = store();
    let won = |statuses: &[u16]| statuses.iter().filter(|status| **status == 200).count();
    for round in 0..8 {
        let statuses = race(&store, &format!("atomic/{round}"));
        assert_eq!(won(&statuses), 1, "{statuses:?}");
        assert!(statuses.iter().all(|status| [200, 412].contains(status)), "{statuses:?}");
    }
    // Each request that begins before the first has ended finds nothing.
    store.set(|settings| settings.conditions = Conditions::Raced);
    let won_races = (0..8).map(|round| won(&race(&store, &format!("raced/{round}")))).max();
    assert!(won_races > Some(1), "{won_races:?}");
    assert_eq!(create(&mut client(&store), "raced/0", b"late"), 412);
    store.set(|settings| settings.conditions = Conditions::Ignored);
    assert_eq!(won(&race(&store, "ignored")), 16);
}

#[test]
fn only_the_client_with_the_right_key_clock_and_region_is_served() {
    let store = store();
    store.replace(BUCKET, "x", "content");
    let address = store.address();
    let access =
        |key: &str, secret: &str| Some(Access { key: key.to_owned(), secret: secret.to_owned() });
    let code = |mut client: Client| {
        let reply = client.send("GET", "/b/x", &[], b"").expect("an answer");
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        (reply.status, all(&text, "Code").first().map(|&code| code.to_owned()))
    };
    let expect = |client: Client, status: u16, name: &str| {
        assert_eq!(code(client), (status, Some(name.to_owned())));
    };
    let right = || Client::new(address, access("emulated", "secret"));
    assert_eq!(code(right()), (200, None));
    expect(Client::new(address, None), 403, "AccessDenied");
    expect(Client::new(address, access("other", "secret")), 403, "InvalidAccessKeyId");
    expect(Client::new(address, access("emulated", "wrong")), 403, "SignatureDoesNotMatch");
    expect(right().in_region("eu-west-1"), 400, "AuthorizationHeaderMalformed");
    expect(right().ahead(-1000), 403, "RequestTimeTooSkewed");
    store.set(|settings| settings.clock_ahead_s = -1000);
    expect(right(), 403, "RequestTimeTooSkewed");
    assert_eq!(code(right().ahead(-1000)), (200, None));
    store.set(|settings| settings.access = None);
    assert_eq!(code(Client::new(address, None)), (200, None));
}

#[test]
fn rules_refuse_reset_delay_and_spoil_requests() {
    let store = store();
    let mut client = client(&store);
    for (effect, status) in [
        (Effect::InternalError, 500),
        (Effect::SlowDown, 503),
        (Effect::Conflict, 409),
        (Effect::AccessDenied, 403),
    ] {
        store.fail(Fault::new(effect).on(Kind::Put).key("log/").nth(2));
        assert_eq!(create(&mut client, &format!("log/{status}"), b"first"), 200);
        assert_eq!(create(&mut client, "log/second", b"second"), status);
        assert!(store.object(BUCKET, "log/second").is_none(), "nothing is done");
        store.heal();
    }
    let put =
        |client: &mut Client, key: &str| client.send("PUT", &format!("/b/{key}"), &[], b"body");
    store.fail(Fault::new(Effect::ResetBefore).key("before"));
    store.fail(Fault::new(Effect::ResetAfter).key("after"));
    store.fail(Fault::new(Effect::Late(Duration::from_millis(300))).key("late"));
    for key in ["before", "after", "late"] {
        put(&mut client, key).expect_err("no answer");
    }
    assert!(store.object(BUCKET, "before").is_none());
    assert!(store.object(BUCKET, "after").is_some());
    let begun = Instant::now();
    while store.object(BUCKET, "late").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it comes");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(begun.elapsed() > Duration::from_millis(200), "it comes late");
    store.heal();
    store.fail(Fault::new(Effect::Truncate).times(1));
    client.send("GET", "/b/after", &[], b"").expect_err("half an answer");
    store.fail(Fault::new(Effect::Corrupt).times(1));
    let spoilt = client.send("GET", "/b/after", &[], b"").expect("an answer").body;
    assert_eq!((spoilt.len(), spoilt == b"body"), (4, false));
    let lost = store.log().iter().filter(|record| record.status == 0).count();
    assert_eq!(lost, 3, "requests without an answer are in the log");
}

#[test]
fn a_hanging_request_ends_with_its_client_or_with_the_outage() {
    let store = store();
    let mut waiting = client(&store);
    assert_eq!(create(&mut waiting, "x", b"x"), 200);
    store.set(|settings| settings.outage = Some(Outage::Hang));
    thread::scope(|scope| {
        let hung = scope.spawn(|| create(&mut waiting, "hung", b"x"));
        thread::sleep(Duration::from_millis(200));
        assert!(!hung.is_finished());
        assert!(store.object(BUCKET, "hung").is_none());
        store.set(|settings| settings.outage = None);
        assert_eq!(hung.join().expect("an answer"), 200);
    });
    store.set(|settings| settings.outage = Some(Outage::Unavailable));
    assert_eq!(create(&mut waiting, "y", b"x"), 503);
    store.set(|settings| settings.outage = Some(Outage::Reset));
    waiting.send("GET", "/b/x", &[], b"").expect_err("the connection is reset");
    waiting.send("GET", "/b/x", &[], b"").expect_err("a new one too");
    store.set(|settings| settings.outage = None);
    assert_eq!(status(&mut waiting, "GET", "x", &[]), 200);
    store.fail(Fault::new(Effect::HangAfter).key("lost"));
    let before = store.log().len();
    let address = store.address();
    let access = store.settings().access;
    let impatient = move || {
        let mut client = Client::new(address, access).patient_for(Duration::from_millis(100));
        client.send("PUT", "/b/lost", &[], b"x").expect_err("no answer");
    };
    thread::spawn(impatient).join().expect("a time-out");
    assert!(store.object(BUCKET, "lost").is_some());
    let begun = Instant::now();
    while store.log().len() == before {
        assert!(begun.elapsed() < Duration::from_secs(60), "it ends when its client has gone");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn objects_in_a_directory_are_found_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let open = |address: SocketAddr| {
        let dir = Some(dir.path().to_owned());
        Emulator::open(Settings::default(), address, dir, 1).expect("a store")
    };
    let store = open(SocketAddr::from(([127, 0, 0, 1], 0)));
    store.make_bucket(BUCKET);
    let mut first = client(&store);
    let body = vec![7; 300_000];
    assert_eq!(create(&mut first, "log/1/2", &body), 200);
    assert_eq!(create(&mut first, "log/1", b"short"), 200);
    assert_eq!(create(&mut first, "log/1", b"other"), 412);
    let address = store.address();
    drop((first, store));
    let store = open(address);
    assert_eq!(store.objects(BUCKET, ""), [("log/1".into(), 5), ("log/1/2".into(), 300_000)]);
    let mut second = client(&store);
    assert_eq!(create(&mut second, "log/1", b"other"), 412);
    let part = [("range", "bytes=299990-400000")];
    let part = second.send("GET", "/b/log/1/2", &part, b"").expect("an answer");
    assert_eq!((part.status, &part.body[..]), (206, &body[..10]));
    assert_eq!(status(&mut second, "DELETE", "log/1/2", &[]), 204);
    assert!(store.object(BUCKET, "log/1/2").is_none());
}

/// The quickest of some requests: other load of the machine makes none quicker.
fn quickest(client: &mut Client, method: &str, body: &[u8], times: usize) -> Duration {
    let request = |_| {
        let begun = Instant::now();
        assert_eq!(client.send(method, "/b/x", &[], body).expect("an answer").status, 200);
        begun.elapsed()
    };
    (0..times).map(request).min().expect("requests")
}

#[test]
fn latency_and_bandwidth_are_those_that_are_set() {
    let store = store();
    let mut client = client(&store);
    store.replace(BUCKET, "x", "small");
    store.set(|settings| settings.first_byte = Duration::from_millis(50));
    let ratio = |took: Duration, set: Duration| took.as_secs_f64() / set.as_secs_f64();
    let small = ratio(quickest(&mut client, "GET", b"", 10), Duration::from_millis(50));
    assert!((1.0..1.3).contains(&small), "{small} of the latency");
    store.set(|settings| {
        settings.first_byte = Duration::ZERO;
        settings.bandwidth = Some(20_000_000);
    });
    let body = vec![1; 4_000_000];
    for (method, body) in [("PUT", &body[..]), ("GET", b"")] {
        let took = ratio(quickest(&mut client, method, body, 3), Duration::from_millis(200));
        assert!((0.97..1.3).contains(&took), "{took} of the time for {method}");
    }
    // Each connection has its own.
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..4 {
            let mut other = Client::new(store.address(), store.settings().access);
            scope.spawn(move || quickest(&mut other, "GET", b"", 1));
        }
    });
    let four = ratio(begun.elapsed(), Duration::from_millis(200));
    assert!((0.97..2.5).contains(&four), "{four} of the time for four connections");
}

#[test]
fn without_a_limit_it_is_quicker_than_with_one() {
    let store = store();
    let mut client = client(&store);
    let body = vec![1; 32 << 20];
    store.set(|settings| settings.bandwidth = Some(85_000_000));
    let put = client.send("PUT", "/b/x", &[], &body).expect("an answer");
    assert_eq!(put.status, 200);
    let limited = quickest(&mut client, "GET", b"", 1);
    store.set(|settings| settings.bandwidth = None);
    let free = quickest(&mut client, "GET", b"", 3);
    assert!(free * 2 < limited, "{free:?} without a limit, {limited:?} with 85 MB/s");
}
