//! The suite that every volume passes on every engine, layered or not.
//!
//! Random batches of ops run on a volume and on a `Vec<u8>`; the volume's answers must agree with
//! the vector. A failure is shrunk to a short list of batches, which the panic shows.
//!
//! To run it on an engine, implement [`Engine`] for it and call [`check`].
#![forbid(unsafe_code)]

mod action;
mod driver;
mod model;
pub mod ops;
mod plain;
pub mod stacks;

use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::Thread;

use proptest::test_runner::{Config, TestCaseError, TestRunner};
use sheave_core::{Io, IoDone, Nanos, Volume};

use action::{Batch, batches};
pub use driver::Driver;
use model::Model;
pub use plain::{Mishap, PlainEngine, wait_for_sockets};

/// Runs file I/O for a backend under test.
pub trait Engine {
    /// The [`Io`] for the backend.
    fn io(&mut self) -> &mut dyn Io;

    /// Requests that were started and whose completion has not been taken.
    fn in_flight(&self) -> usize;

    /// Waits until a request has completed or the time is `until`, and takes the completions.
    /// Called only if a request is in flight or `until` is given.
    fn wait(&mut self, until: Option<Nanos>, done: &mut Vec<IoDone>);
}

/// A waker for [`Io::waker`] that ends a [`Driver`]'s wait in this thread.
#[must_use]
pub fn unparker() -> Waker {
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    Arc::new(Unpark(std::thread::current())).into()
}

/// Parameters of a check.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Random runs, each on a volume of its own.
    pub cases: u32,
    /// Whether ops may begin and end anywhere, not only at its blocks.
    pub unaligned: bool,
}

/// Checks volumes made by `make_volume`, which must be empty (all zeroes), on engines made by
/// `make_engine`. Each is used through two backends.
///
/// # Panics
/// When an answer is wrong or an op is lost.
pub fn check<E: Engine>(
    options: Options,
    make_volume: impl Fn() -> Arc<dyn Volume>,
    make_engine: impl Fn() -> E,
) {
    let volume = make_volume();
    let (minimum, size) = (volume.info().block.minimum, volume.size());
    drop(volume);
    let block = if options.unaligned { 1 } else { u64::from(minimum) };
    let config = Config { cases: options.cases, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&batches(size, block), |batches| {
        let volume = make_volume();
        run(&*volume, &batches, [make_engine(), make_engine()]).map_err(TestCaseError::fail)
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// Runs batches on a volume and the model.
fn run<E: Engine>(volume: &dyn Volume, batches: &[Batch], engines: [E; 2]) -> Result<(), String> {
    let backend = || volume.backend().map_err(|error| format!("no backend: {error}"));
    let [first, second] = engines;
    let mut drivers = [Driver::new(backend()?, first), Driver::new(backend()?, second)];
    let mut model = Model::new(volume.size());
    for batch in batches {
        let driver = &mut drivers[usize::from(batch.second)];
        let ops = batch.ops(driver);
        let outcomes = driver.run(ops.clone());
        for (op, outcome) in ops.iter().zip(outcomes) {
            model.check(op, outcome).map_err(|why| format!("{why}; {op:?}"))?;
        }
    }
    // Each backend sees the writes of the other.
    for driver in &mut drivers {
        for op in model.survey() {
            let outcome = driver.run(vec![op.clone()]).remove(0);
            model.check(&op, outcome).map_err(|why| format!("at the end: {why}; {op:?}"))?;
        }
    }
    Ok(())
}
