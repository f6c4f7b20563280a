//! A volume is a disk whatever becomes of its server.

use std::cell::RefCell;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use sheave_conformance::{Driver, Options, PlainEngine, check};
use sheave_core::{Buf, ByteRange, Op, Reply, Volume};
use sheave_remote::RemoteOptions;

use crate::server::{Script, Server};
use crate::support::{ROOM, SMALL, open};

const SIZE: u64 = 3 * (64 << 10) + 777;

/// Runs the volumes' suite on servers that die with one in so many requests; each case has one of
/// its own. Answers how often they died.
fn suite(dies_one_in: u64, multi_conn: bool, change: impl Fn(&mut RemoteOptions) + Copy) -> u64 {
    let servers = RefCell::new(Vec::new());
    let make_volume = || -> Arc<dyn Volume> {
        let mut script = Script::new(SIZE);
        script.info.can.multi_conn = multi_conn;
        script.seed = servers.borrow().len() as u64 * 77_777 + 1;
        let server = Server::start(script);
        // The first connection is not to be missed.
        let volume = open(&server, change);
        server.lock().script.dies_one_in = dies_one_in;
        servers.borrow_mut().push(server);
        Arc::new(volume)
    };
    let options = Options { cases: 25, unaligned: true };
    check(options, make_volume, || PlainEngine::new(ROOM));
    let servers = servers.into_inner();
    for server in &servers {
        assert_eq!(server.lock().wrong, None, "what the server saw");
    }
    servers.iter().map(|server| server.lock().deaths).sum()
}

#[test]
fn nothing_is_lost_with_a_server_that_dies_at_every_point() {
    let deaths = suite(6, false, |_| ());
    assert!(deaths > 100, "{deaths} deaths");
}

#[test]
fn nothing_is_lost_over_several_connections() {
    let deaths = suite(6, true, |options| options.connections = Some(4));
    assert!(deaths > 100, "{deaths} deaths");
}

#[test]
fn nothing_is_lost_where_little_can_be_kept() {
    let deaths = suite(6, false, |options| options.replay_bytes = 64 << 10);
    assert!(deaths > 100, "{deaths} deaths");
}

/// Ops that are in flight together, and may overlap: position, length, and what is done.
#[derive(Clone, Debug)]
struct Step {
    at: u64,
    len: u64,
    what: u8,
}

fn batches() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let step = (0..64_u64, 1..24_u64, 0..10_u8).prop_map(|(at, len, what)| Step {
        at: at * 512,
        len: (len * 512).min(SMALL - at * 512),
        what,
    });
    prop::collection::vec(prop::collection::vec(step, 1..12), 1..12)
}

/// Ops of one batch, and what they make of the model: for each byte the values that it may have.
/// The last is the one that it has if ops are carried out in the order in which they are given.
fn ops(steps: &[Step], number: u8, model: &mut [Vec<u8>]) -> Vec<Op> {
    let mut touched = vec![false; model.len()];
    let mut set = |range: ByteRange, value: u8| {
        for at in range.start() as usize..range.end() as usize {
            if !std::mem::replace(&mut touched[at], true) {
                model[at].clear();
            }
            model[at].push(value);
        }
    };
    let mut ops = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let range = ByteRange::within(step.at, step.len, SMALL).unwrap();
        let fua = step.what % 3 == 0;
        ops.push(match step.what {
            0..=6 => {
                let byte = number.wrapping_mul(31).wrapping_add(index as u8 + 1);
                set(range, byte);
                let data = Buf::from_bytes(&vec![byte; step.len as usize]).into();
                Op::Write { range, data, fua }
            }
            7 | 8 => {
                set(range, 0);
                Op::WriteZeroes { range, fua, no_hole: false, fast: false }
            }
            _ => Op::Flush,
        });
    }
    ops
}

fn read_all(driver: &mut Driver<PlainEngine>) -> Result<Vec<u8>, String> {
    let range = ByteRange::within(0, SMALL, SMALL).unwrap();
    match driver.run_one(Op::Read { range, into: None }) {
        Ok(Reply::Data(data)) => Ok(data.to_vec()),
        other => Err(format!("a read: {other:?}")),
    }
}

fn run(batches: &[Vec<Step>], seed: u64, connections: usize) -> Result<(), String> {
    let mut script = Script::new(SMALL);
    (script.seed, script.info.can.multi_conn) = (seed, connections > 1);
    let server = Server::start(script);
    let volume = open(&server, |options| options.connections = Some(connections));
    server.lock().script.dies_one_in = 9;
    let mut drivers = [(), ()].map(|()| {
        Driver::new(volume.backend().unwrap(), PlainEngine::new(ROOM).refusing_one_in(5, seed))
    });
    let mut model = vec![vec![0]; SMALL as usize];
    for (number, steps) in batches.iter().enumerate() {
        let driver = &mut drivers[number % 2];
        for outcome in driver.run(ops(steps, number as u8, &mut model)) {
            outcome.map_err(|error| error.to_string())?;
        }
        let bytes = read_all(driver)?;
        for (at, (byte, values)) in bytes.iter().zip(&mut model).enumerate() {
            let is_right = match connections {
                1 => values.last() == Some(byte),
                _ => values.contains(byte),
            };
            if !is_right {
                return Err(format!("batch {number}: byte {at} is {byte}, not one of {values:?}"));
            }
            *values = vec![*byte];
        }
        // What has been read stays as it is.
        server.lock().die();
        if read_all(driver)? != bytes {
            return Err(format!("batch {number}: bytes have changed by themselves"));
        }
    }
    let wrong = server.lock().wrong.take();
    wrong.map_or(Ok(()), Err)
}

#[test]
fn overlapping_writes_have_one_order_for_ever() {
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(
        &(batches(), any::<u64>(), prop_oneof![Just(1_usize), Just(3)]),
        |(batches, seed, connections)| {
            run(&batches, seed, connections).map_err(TestCaseError::fail)
        },
    );
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}
