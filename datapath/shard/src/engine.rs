//! Engines run sessions; which ones a node can have depends on its kernel.

use std::collections::HashSet;
use std::fmt;
use std::sync::mpsc::{self, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind};

use crate::Clock;
use crate::assignment::{Assignment, Quiesced};
use crate::ending::Ending;
use crate::inbox::{Command, TELL_RETRY};
use crate::start::{ShardHandle, limit_of, start_shards, stop_shards};
use crate::threads::ThreadEngine;

/// How often a command is sent again to a shard whose inbox is full, every [`TELL_RETRY`].
const TELL_TRIES: usize = 1000;

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The ring where the kernel has it, else threads.
    #[default]
    Auto,
    /// The ring, or fail.
    Uring,
    /// One thread per connection.
    Threads,
}

/// The configuration of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// The engine to use.
    pub choice: EngineChoice,
    /// Shards; the thread engine has none.
    pub shards: usize,
    /// How long a busy shard polls before it sleeps, in microseconds; 0 = never.
    pub poll_us: u32,
}

/// A running engine.
pub struct Engine {
    kind: Kind,
    reason: String,
    /// Held while a volume is opened on all shards, and while the queues of a device are handed to
    /// them. So no queue waits for another device's volume while other queues of its device have
    /// sent commands, and a failed opening does not close another volume.
    pub(crate) handing: Mutex<()>,
}

enum Kind {
    Ring(Vec<ShardHandle>),
    Threads(ThreadEngine),
}

impl Engine {
    /// Starts the requested engine, or with [`EngineChoice::Auto`] the best that this node can
    /// have.
    ///
    /// # Errors
    /// When the ring is requested and the kernel does not have it, or threads cannot be started.
    pub fn start(config: EngineConfig, clock: Clock) -> Result<Self, Error> {
        let probed = match config.choice {
            EngineChoice::Threads => None,
            EngineChoice::Auto | EngineChoice::Uring => Some(sheave_ring::probe()),
        };
        match probed {
            None => Ok(Self::threads(clock, "asked for".to_owned())),
            Some(Ok(probe)) => match start_shards(config.shards, config.poll_us, &probe, clock) {
                Ok(shards) => Ok(Self::new(Kind::Ring(shards), format!("{:?}", probe.mode))),
                // The probe made one ring; the limit may be too low for more.
                Err(error) if config.choice == EngineChoice::Auto => {
                    let limit = limit_of(&error);
                    let reason =
                        format!("no io_uring for {} shards: {error}{limit}", config.shards);
                    Ok(Self::threads(clock, reason))
                }
                Err(error) => {
                    let (shards, limit) = (config.shards, limit_of(&error));
                    let what = format!(
                        "io_uring for {shards} shards{limit}; fewer --shards need less, and \
                         `--engine threads` works without it"
                    );
                    Err(Error::from_io("start", what, error))
                }
            },
            Some(Err(error)) if config.choice == EngineChoice::Uring => {
                let limit = limit_of(&error);
                let what = format!(
                    "io_uring cannot be used here{limit}; `--engine threads` works without it"
                );
                Err(Error::from_io("start", what, error))
            }
            Some(Err(error)) => {
                let limit = limit_of(&error);
                Ok(Self::threads(clock, format!("no io_uring here: {error}{limit}")))
            }
        }
    }

    fn threads(clock: Clock, reason: String) -> Self {
        Self::new(Kind::Threads(ThreadEngine::new(clock)), reason)
    }

    fn new(kind: Kind, reason: String) -> Self {
        Self { kind, reason, handing: Mutex::new(()) }
    }

    /// The shards; the thread engine has none.
    pub(crate) fn shards(&self) -> &[ShardHandle] {
        match &self.kind {
            Kind::Ring(shards) => shards,
            Kind::Threads(_) => &[],
        }
    }

    /// Hands a connection to the shard that has the fewest.
    ///
    /// # Errors
    /// When the inbox of that shard is full; the connection is dropped.
    pub fn serve(&self, assignment: Assignment) -> Result<(), Error> {
        // On a non-blocking socket a ring would answer EAGAIN instead of waiting. A thread waits
        // for more than its socket.
        let is_nonblocking = matches!(self.kind, Kind::Threads(_));
        rustix::io::ioctl_fionbio(&assignment.socket, is_nonblocking)
            .map_err(|errno| Error::from_io("serve", "socket mode", errno.into()))?;
        match &self.kind {
            Kind::Threads(threads) => threads.serve(assignment),
            Kind::Ring(shards) => {
                let inbox = &shards
                    .iter()
                    .min_by_key(|shard| shard.inbox.load())
                    .expect("an engine has a shard")
                    .inbox;
                inbox.assign(Command::Serve(assignment))
            }
        }
    }

    /// How many queues a device should have here; 0 if this engine cannot serve any.
    #[must_use]
    pub fn device_queues(&self) -> usize {
        self.shards().len()
    }

    /// Quiesces the connections that have a key, and returns those that are quiescent within this
    /// time. The others keep quiescing until [`Engine::resume`]. The thread engine returns none.
    pub fn quiesce(&self, within: Duration) -> Vec<Quiesced> {
        let (quiesced, all) = mpsc::channel();
        self.tell(|| Command::Quiesce(quiesced.clone()));
        drop(quiesced);
        let by = Instant::now() + within;
        let next = || all.recv_timeout(by.saturating_duration_since(Instant::now())).ok();
        std::iter::from_fn(next).collect()
    }

    /// Resumes the connections that [`Engine::quiesce`] did not return.
    pub fn resume(&self) {
        self.tell(|| Command::Resume);
    }

    /// Completes all I/O of the device with this key with errors: requests that wait for its volume
    /// and all that follow.
    pub fn abandon(&self, key: u64) {
        self.tell(|| Command::Abandon(key));
    }

    /// Ends the connections with these keys ([`Assignment::key`]). Does not wait for them; with
    /// [`Ending::InOrder`] a connection lasts until its client has read all replies.
    pub fn end(&self, keys: HashSet<u64>, ending: Ending) {
        match &self.kind {
            Kind::Threads(threads) => threads.end(&keys, ending),
            Kind::Ring(_) => {
                let keys = Arc::new(keys);
                self.tell(|| Command::End(Arc::clone(&keys), ending));
            }
        }
    }

    /// Sends a command to all shards.
    fn tell(&self, command: impl Fn() -> Command) {
        for shard in self.shards() {
            let mut command = command();
            // An inbox is full only for a moment, unless its shard hangs.
            for _ in 0..TELL_TRIES {
                let Err(back) = shard.inbox.send(command) else { break };
                command = back;
                std::thread::sleep(TELL_RETRY);
            }
        }
    }

    /// Connections being served.
    #[must_use]
    pub fn connections(&self) -> usize {
        match &self.kind {
            Kind::Threads(threads) => threads.connections(),
            Kind::Ring(shards) => shards.iter().map(|shard| shard.inbox.load()).sum(),
        }
    }

    /// Checks that all shards answer, which each does after its current turn. The thread engine has
    /// nothing in common that could hang.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] names those that have not answered in time.
    pub fn check(&self, within: Duration) -> Result<(), Error> {
        let shards = self.shards();
        let begun = Instant::now();
        let (answer, answers) = sync_channel(shards.len());
        for (index, shard) in shards.iter().enumerate() {
            // A shard whose inbox is full counts as silent.
            let _ = shard.inbox.send(Command::Echo(index, answer.clone()));
        }
        let mut silent: Vec<_> = (0..shards.len()).collect();
        while !silent.is_empty() {
            let left = within.saturating_sub(begun.elapsed());
            let Ok(index) = answers.recv_timeout(left) else { break };
            silent.retain(|&other| other != index);
        }
        if silent.is_empty() {
            return Ok(());
        }
        let silent: Vec<_> = silent.iter().map(|index| format!("shard-{index}")).collect();
        let what = format!("{} gave no sign of life for {within:?}", silent.join(", "));
        Err(Error::new(ErrorKind::Busy, "check", what))
    }

    /// Lets connections finish their requests in flight within [`STOP_GRACE`](crate::STOP_GRACE),
    /// and ends all threads.
    pub fn stop(self) {
        match self.kind {
            Kind::Threads(threads) => threads.stop(),
            Kind::Ring(shards) => stop_shards(shards),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Ring(shards) => write!(f, "io_uring, {} shards ({})", shards.len(), self.reason),
            Kind::Threads(_) => write!(f, "threads ({})", self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::Inbox;

    const SOON: Duration = Duration::from_secs(10);

    fn start(choice: EngineChoice) -> Engine {
        let config = EngineConfig { choice, shards: 3, poll_us: 0 };
        Engine::start(config, Clock::start()).unwrap()
    }

    #[test]
    fn shards_that_work_answer_as_often_as_they_are_asked() {
        for choice in [EngineChoice::Auto, EngineChoice::Threads] {
            let engine = start(choice);
            for _ in 0..3 {
                engine.check(SOON).unwrap();
            }
            engine.stop();
        }
    }

    #[test]
    fn a_shard_that_stands_still_is_named() {
        let mut engine = start(EngineChoice::Auto);
        let Kind::Ring(shards) = &mut engine.kind else { return };
        let inbox = Inbox::of(1).unwrap();
        shards.push(ShardHandle { inbox: Arc::new(inbox), thread: std::thread::spawn(|| {}) });
        // The second time its inbox is full.
        for _ in 0..2 {
            let error = engine.check(Duration::from_millis(200)).unwrap_err().to_string();
            assert!(error.contains("shard-3 gave no sign of life for 200ms"), "{error}");
        }
        let Kind::Ring(shards) = &mut engine.kind else { unreachable!("it was one") };
        shards.pop();
        engine.check(SOON).unwrap();
        engine.stop();
    }
}
