//! Requests that the server dies of, each time.

use std::time::Duration;

use sheave_core::{ByteRange, ErrorKind, Op, Volume as _};
use sheave_proto::Request;
use sheave_proto::wire::command;

use crate::server::{Script, Server};
use crate::support::{SMALL, driver, open, read, wait_until, write};

/// Deaths over one request until it is given up.
const BREAKS_MAX: u64 = 10;
const BAD: u64 = 4096;

fn is_at_bad(request: &Request) -> bool {
    request.offset == BAD
}

#[test]
fn a_read_that_the_server_dies_of_ends_and_starves_no_other() {
    for connections in [1, 3] {
        let mut script = Script::new(SMALL);
        script.info.can.multi_conn = true;
        let server = Server::start(script);
        let volume = open(&server, |options| options.connections = Some(connections));
        let mut others = driver(&volume);
        others.run_one(write(BAD, 7)).unwrap();
        others.run_one(Op::Flush).unwrap();
        server.lock().poison = Some(is_at_bad);
        std::thread::scope(|scope| {
            let bad = scope.spawn(|| read(&mut driver(&volume), BAD));
            wait_until(&server, |life| life.deaths > 0);
            for _ in 0..50 {
                others.run_one(write(0, 1)).unwrap();
                assert_eq!(read(&mut others, 0).unwrap(), [1; 512]);
            }
            let error = bad.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(error.to_string().contains("this read of 512 bytes at 4096"), "{error}");
        });
        assert_eq!(server.lock().deaths, BREAKS_MAX);
        assert!(!volume.has_lost_data_itself());
        // It is a disk as before, and so is the place once the server can read it.
        server.lock().poison = None;
        assert_eq!(read(&mut others, BAD).unwrap(), [7; 512]);
        assert_eq!(read(&mut others, 0).unwrap(), [1; 512]);
    }
}

#[test]
fn a_write_that_the_server_dies_of_fails_and_costs_no_other_data() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    server.lock().poison = Some(is_at_bad);
    let outcomes = driver.run(vec![write(512, 2), write(BAD, 3), write(1024, 4)]);
    let errors: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].to_string().contains("this write of 512 bytes at 4096"), "{}", errors[0]);
    for (at, byte) in [(0, 1), (512, 2), (1024, 4)] {
        assert_eq!(read(&mut driver, at).unwrap(), [byte; 512]);
    }
    driver.run_one(Op::Flush).unwrap();
    assert!(!volume.has_lost_data_itself());
}

#[test]
fn a_write_that_the_server_dies_of_when_it_is_repeated_is_a_loss() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    driver.run_one(write(BAD, 2)).unwrap();
    let mut life = server.lock();
    life.poison = Some(is_at_bad);
    life.die();
    drop(life);
    let why = read(&mut driver, 0).unwrap_err().to_string();
    assert!(why.contains("repetition of a write at 4096") && why.contains("may be lost"), "{why}");
    assert!(volume.has_lost_data_itself());
    assert_eq!(server.lock().deaths, 1 + BREAKS_MAX);
}

#[test]
fn a_flush_that_the_server_dies_of_fails_and_keeps_what_it_would_have_covered() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    server.lock().poison = Some(|request| request.command == command::FLUSH);
    let error = driver.run_one(Op::Flush).unwrap_err();
    assert!(error.to_string().contains("connections broke over this flush;"), "{error}");
    let mut life = server.lock();
    life.poison = None;
    life.die();
    drop(life);
    assert_eq!(read(&mut driver, 0).unwrap(), [1; 512]);
    driver.run_one(Op::Flush).unwrap();
}

#[test]
fn a_flush_of_its_own_that_the_server_dies_of_is_a_loss_once_there_is_no_room_to_write() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |options| options.replay_bytes = 16 << 10);
    let mut driver = driver(&volume);
    server.lock().poison = Some(|request| request.command == command::FLUSH);
    let error = (0..100).find_map(|turn| driver.run_one(write(turn % 64 * 512, 1)).err()).unwrap();
    assert!(error.to_string().contains("may be lost"), "{error}");
    assert!(volume.has_lost_data_itself());
}

#[test]
fn no_request_is_given_up_while_the_server_answers_nothing() {
    let server = Server::start(Script::new(SMALL));
    let volume = open(&server, |_| ());
    let mut driver = driver(&volume);
    driver.run_one(write(0, 1)).unwrap();
    server.lock().poison = Some(|_| true);
    let range = ByteRange::within(0, 512, SMALL).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_until(&server, |life| life.deaths > 3 * BREAKS_MAX);
            // Some more, with writes repeated in between.
            std::thread::sleep(Duration::from_millis(50));
            server.lock().poison = None;
        });
        let ops = vec![Op::Read { range, into: None }, write(1024, 2), Op::Flush];
        driver.run(ops).into_iter().for_each(|outcome| drop(outcome.unwrap()));
    });
    assert_eq!(read(&mut driver, 1024).unwrap(), [2; 512]);
}
