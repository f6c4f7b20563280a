//! What a volume makes of a server that is away, has changed, or answers wrongly or never.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sheave_conformance::{Driver, Engine as _, PlainEngine};
use sheave_core::{Backend, Buf, ByteRange, ErrorKind, LinkState, Op, Submitted, Tag, Volume};
use sheave_remote::{RemoteOptions, RemoteVolume};

use crate::server::{Hold, Life, Script, Server};
use crate::support::{ROOM, SMALL, driver, fails, open, read, wait_until, write};

const MIB: u64 = 1 << 20;

#[test]
fn a_volume_that_cannot_repeat_its_writes_says_so() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |options| options.replay_bytes = 0);
    let mut driver = Driver::new(volume.backend().unwrap(), PlainEngine::new(ROOM));
    driver.run_one(write(0, 1)).unwrap();
    driver.run_one(Op::Flush).unwrap();
    server.lock().die();
    // All was flushed.
    driver.run_one(write(512, 2)).unwrap();
    assert!(!volume.has_lost_data_itself());
    server.lock().die();
    let why = fails(driver.run_one(write(1024, 3)));
    assert!(why.contains("may be lost"), "{why}");
    assert!(volume.has_lost_data_itself());
    assert!(fails(driver.run_one(Op::Flush)).contains("may be lost"));
    assert!(volume.backend().err().unwrap().to_string().contains("may be lost"));
}

#[test]
fn without_a_server_ops_fail_after_the_time_that_was_given_and_go_on_when_it_is_back() {
    let server = Server::start(Script::new(SMALL));
    let limit = Duration::from_millis(300);
    let volume = open(&server, |options| options.reconnect_timeout = Some(limit));
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    driver.run_one(Op::Flush).unwrap();
    server.lock().go_away();
    let begun = Instant::now();
    let error = read(&mut driver, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(begun.elapsed() >= limit && error.to_string().contains("reconnect-timeout"));
    let begun = Instant::now();
    read(&mut driver, 0).unwrap_err();
    assert!(begun.elapsed() < limit, "later ones fail at once");
    server.lock().is_away = false;
    let back = Instant::now();
    while read(&mut driver, 0).is_err() {
        assert!(back.elapsed() < Duration::from_secs(60), "it is back");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(read(&mut driver, 0).unwrap(), [1; 512]);
    assert!(!volume.has_lost_data_itself());
}

#[test]
fn without_a_server_kept_writes_are_given_up_loudly_and_for_good() {
    let server = Server::start(Script::new(SMALL));
    let limit = Duration::from_millis(200);
    let volume = open(&server, |options| options.reconnect_timeout = Some(limit));
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    server.lock().go_away();
    let why = fails(driver.run_one(Op::Flush));
    assert!(why.contains("may be lost") && why.contains("away"), "{why}");
    assert!(volume.has_lost_data_itself());
    server.lock().is_away = false;
    std::thread::sleep(limit);
    assert!(read(&mut driver, 0).unwrap_err().to_string().contains("may be lost"));
}

/// Changes the server while nothing or something is kept; answers what ops then say.
fn after(change: fn(&mut Life), is_kept: bool) -> (String, bool) {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    if !is_kept {
        driver.run_one(Op::Flush).unwrap();
    }
    let mut life = server.lock();
    change(&mut life);
    life.die();
    drop(life);
    let why = read(&mut driver, 0).unwrap_err().to_string();
    (why, volume.has_lost_data_itself())
}

#[test]
fn a_server_that_comes_back_as_another_is_not_used() {
    type Change = fn(&mut Life);
    let changes: [(Change, &str); 5] = [
        (|life| life.script.size -= 512, "has shrunk from 32768 to 32256 bytes"),
        (|life| life.script.info.read_only = true, "is read-only now"),
        (|life| life.script.info.block.minimum = 4096, "block sizes have changed: minimum 1 to"),
        (|life| life.script.info.can.flush = false, "no longer has flush"),
        (|life| life.script.info.can.trim = false, "no longer has trim"),
    ];
    for (change, want) in changes {
        for is_kept in [false, true] {
            let (why, has_lost) = after(change, is_kept);
            assert!(why.contains(want), "{why}");
            assert_eq!((why.contains("may be lost"), has_lost), (is_kept, is_kept), "{why}");
        }
    }
}

#[test]
fn a_write_that_is_refused_the_second_time_is_a_loss() {
    let (why, has_lost) = after(|life| life.refuses_writes = true, true);
    assert!(why.contains("could not be repeated") && why.contains("may be lost"), "{why}");
    assert!(has_lost);
}

#[test]
fn a_server_that_never_answers_is_asked_again_over_another_connection() {
    let server = Server::start(Script::new(SMALL));
    let limit = Duration::from_millis(200);
    let volume = open(&server, |options| options.request_timeout = limit);
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    server.lock().mute = 3;
    let begun = Instant::now();
    assert_eq!(read(&mut driver, 0).unwrap(), [1; 512]);
    assert!(begun.elapsed() >= 3 * limit);
}

#[test]
fn a_server_that_breaks_the_protocol_is_asked_again_over_another_connection() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    for garbage in ["wrong", "twice", "much"] {
        server.lock().garbage = Some(garbage);
        // An answer that comes twice is noticed at the next one.
        for _ in 0..3 {
            assert_eq!(read(&mut driver, 0).unwrap(), [1; 512], "{garbage}");
        }
        assert_eq!(server.lock().garbage, None, "{garbage}");
    }
    driver.run_one(Op::Flush).unwrap();
}

#[test]
fn an_export_grows_while_it_is_open() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    assert_eq!(volume.grow().unwrap(), SMALL);
    server.lock().grow(2 * SMALL);
    assert_eq!(
        (volume.size(), volume.grow().unwrap(), volume.size()),
        (SMALL, 2 * SMALL, 2 * SMALL)
    );
    let range = ByteRange::within(SMALL, 512, 2 * SMALL).unwrap();
    let data = Buf::from_bytes(&[9; 512]).into();
    driver.run_one(Op::Write { range, data, fua: false }).unwrap();
    assert_eq!(read(&mut driver, SMALL).unwrap(), [9; 512]);
    assert_eq!(read(&mut driver, 0).unwrap(), [1; 512]);
    server.lock().script.size = SMALL;
    let why = volume.grow().unwrap_err().to_string();
    assert!(why.contains("has shrunk"), "{why}");
}

#[test]
fn a_handshake_that_ends_anywhere_is_an_error_and_then_a_new_attempt() {
    let server = Server::start(Script::new(SMALL));
    let options = || {
        let mut options = RemoteOptions::new(server.uri().parse().unwrap());
        options.connect_timeout = Duration::from_secs(60);
        options
    };
    let mut lens = 0..;
    let errors: Vec<_> = lens
        .by_ref()
        .map_while(|len| {
            server.lock().script.handshake_len = Some(len);
            RemoteVolume::open(options()).err()
        })
        .map(|error| error.to_string())
        .collect();
    assert!(errors.len() > 100, "a handshake has more bytes than {}", errors.len());
    for error in &errors {
        assert!(error.contains("closed the connection") && !error.contains('\n'), "{error}");
    }
    // Silence ends after a time.
    let mut script = Script::new(SMALL);
    (script.handshake_len, script.is_silent_then) = (Some(20), true);
    server.lock().script = script;
    let limit = Duration::from_millis(200);
    let begun = Instant::now();
    let impatient = RemoteOptions { connect_timeout: limit, ..options() };
    let error = RemoteVolume::open(impatient).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(begun.elapsed() >= limit && error.to_string().contains("does not answer in time"));
    // A volume that is open goes on trying.
    server.lock().script.handshake_len = None;
    let volume = RemoteVolume::open(options()).unwrap();
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    for len in [0, 20, 60] {
        let mut life = server.lock();
        (life.script.handshake_len, life.script.is_silent_then) = (Some(len), false);
        life.die();
        drop(life);
        let restore = Arc::clone(&server.life);
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(150));
            restore.lock().unwrap().script.handshake_len = None;
        });
        assert_eq!(read(&mut driver, 0).unwrap(), [1; 512]);
        later.join().unwrap();
    }
}

#[test]
fn a_request_that_is_never_answered_is_sent_again_though_others_are() {
    let server = Server::start(Script::new(SMALL));
    let limit = Duration::from_millis(30);
    let volume = open(&server, |options| options.request_timeout = limit);
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    server.lock().mute = 1;
    let begun = Instant::now();
    // The first is lost; the others keep the connection busy.
    let mut ops = vec![write(0, 2)];
    ops.extend((0..20_000).map(|_| {
        let range = ByteRange::within(1024, 512, SMALL).unwrap();
        Op::Read { range, into: None }
    }));
    let mut outcomes = driver.run(ops).into_iter();
    outcomes.next().unwrap().unwrap();
    assert!(begun.elapsed() >= limit && server.lock().mute == 0);
    assert!(outcomes.all(|outcome| outcome.is_ok()));
    assert_eq!(read(&mut driver, 0).unwrap(), [2; 512]);
}

#[test]
fn a_trim_that_is_refused_the_second_time_is_no_loss() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    let range = ByteRange::within(1024, 512, SMALL).unwrap();
    driver.run_one(Op::Trim { range, fua: false }).unwrap();
    let mut life = server.lock();
    life.refuses_trims = true;
    life.die();
    drop(life);
    assert_eq!(read(&mut driver, 0).unwrap(), [1; 512]);
    assert!(!volume.has_lost_data_itself());
}

#[test]
fn a_server_that_only_comes_and_goes_is_away() {
    let server = Server::start(Script::new(SMALL));
    let limit = Duration::from_millis(300);
    let volume = open(&server, |options| options.reconnect_timeout = Some(limit));
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    driver.run_one(Op::Flush).unwrap();
    // It takes connections, and ends each with the first request.
    server.lock().script.dies_one_in = 1;
    let begun = Instant::now();
    let error = read(&mut driver, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(begun.elapsed() >= limit);
}

#[test]
fn a_write_that_a_server_still_works_on_is_not_repeated_when_another_connection_ends() {
    let mut script = Script::new(SMALL);
    script.info.can.multi_conn = true;
    let server = Server::start(script);
    let volume = open(&server, |options| options.connections = Some(2));
    let mut other = driver(&volume);
    other.run_one(write(0, 1)).unwrap();
    let mut life = server.lock();
    (life.hold, life.garbage) = (Hold::Next, Some("cut"));
    drop(life);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let range = ByteRange::within(512, 512, SMALL).unwrap();
            let ops = vec![write(0, 2), Op::Read { range, into: None }];
            driver(&volume).run(ops).into_iter().for_each(|outcome| drop(outcome.unwrap()));
        });
        wait_until(&server, |life| life.hold == Hold::Held && life.garbage.is_none());
        scope.spawn(|| {
            // Long enough for a new connection and what could be repeated over it.
            std::thread::sleep(Duration::from_millis(500));
            server.lock().hold = Hold::Released;
        });
        other.run_one(write(0, 3)).unwrap();
        other.run_one(Op::Flush).unwrap();
    });
    wait_until(&server, |life| life.hold == Hold::None);
    assert_eq!(read(&mut other, 0).unwrap(), [3; 512]);
}

#[test]
fn a_quick_flush_of_its_own_comes_early() {
    let server = Server::start(Script::new(16 * MIB));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    let kept = || volume.link().unwrap().get().kept_bytes;
    for at in 0..12 {
        let range = ByteRange::within(at * MIB, MIB, 16 * MIB).unwrap();
        let data = Buf::zeroed(MIB as usize).into();
        driver.run_one(Op::Write { range, data, fua: false }).unwrap();
    }
    let begun = Instant::now();
    while kept() > 8 * MIB {
        assert!(begun.elapsed() < Duration::from_secs(60), "{} are kept", kept());
        read(&mut driver, 0).unwrap();
    }
    driver.run_one(write(0, 7)).unwrap();
    assert!(kept() > 0, "a little is kept for long");
}

#[test]
fn a_flush_of_its_own_that_fails_is_a_loss_since_the_next_one_may_succeed_over_it() {
    let server = Server::start(Script::new(16 * MIB));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    // The first flush, which opening makes, is through.
    driver.run_one(Op::Flush).unwrap();
    server.lock().flush_fails_once = true;
    let begun = Instant::now();
    for at in (0..12).cycle() {
        let range = ByteRange::within(at * MIB, MIB, 16 * MIB).unwrap();
        let data = Buf::zeroed(MIB as usize).into();
        if driver.run_one(Op::Write { range, data, fua: false }).is_err() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "no flush of its own comes");
    }
    assert!(!server.lock().flush_fails_once);
    assert!(fails(driver.run_one(Op::Flush)).contains("a flush failed"));
    assert!(volume.has_lost_data_itself());
}

#[test]
fn what_waits_for_a_server_that_is_away_is_bounded() {
    let server = Server::start(Script::new(4 * MIB));
    let volume = open(&server, |_| ());
    let (mut first, mut second) = (volume.backend().unwrap(), volume.backend().unwrap());
    let mut engine = PlainEngine::new(ROOM);
    server.lock().go_away();
    let write = || {
        let range = ByteRange::within(0, MIB, MIB).unwrap();
        Op::Write { range, data: Buf::zeroed(MIB as usize).into(), fua: false }
    };
    let submit = |backend: &mut Box<dyn Backend>, tag, engine: &mut PlainEngine| {
        matches!(backend.submit(write(), Tag(tag), engine.io()), Submitted::Queued)
    };
    let count = (0..1000).take_while(|tag| submit(&mut first, *tag, &mut engine)).count();
    assert_eq!(count, 128, "MiB");
    assert!(submit(&mut second, 0, &mut engine) && !submit(&mut second, 1, &mut engine));
    drop(second);
    let mut third = volume.backend().unwrap();
    let begun = Instant::now();
    while volume.link().unwrap().get().state != LinkState::Down {
        assert!(begun.elapsed() < Duration::from_secs(60), "the connection does not end");
        let (until, mut done) = (engine.io().now() + 1_000_000, Vec::new());
        engine.wait(Some(until), &mut done);
        done.into_iter().for_each(|done| first.io_done(done, engine.io()));
        assert!(first.reap(engine.io()).is_none());
    }
    assert!(!submit(&mut third, 0, &mut engine), "none while the server is away");
}

#[test]
fn an_export_that_grows_costs_no_write_that_nothing_keeps() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |options| options.replay_bytes = 0);
    server.lock().hold = Hold::Next;
    std::thread::scope(|scope| {
        scope.spawn(|| driver(&volume).run_one(write(0, 1)).unwrap());
        wait_until(&server, |life| life.hold == Hold::Held);
        server.lock().grow(2 * SMALL);
        let error = volume.grow().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        server.lock().hold = Hold::Released;
    });
    let mut driver = driver(&volume);
    driver.run_one(Op::Flush).unwrap();
    assert_eq!(volume.grow().unwrap(), 2 * SMALL);
    assert!(!volume.has_lost_data_itself());
}
