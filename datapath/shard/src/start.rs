//! Starts and ends the threads of the shards.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use sheave_core::{Error, ErrorKind};

use crate::Clock;
use crate::inbox::{Command, Inbox, TELL_RETRY};
use crate::shard::Shard;

/// A running shard.
pub(crate) struct ShardHandle {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) thread: JoinHandle<()>,
}

impl ShardHandle {
    /// Sends a command, as soon as the inbox has room.
    ///
    /// # Errors
    /// When the shard has ended.
    pub(crate) fn hand(&self, mut command: Command) -> Result<(), Error> {
        while let Err(back) = self.inbox.send(command) {
            self.check()?;
            command = back;
            std::thread::sleep(TELL_RETRY);
        }
        Ok(())
    }

    /// # Errors
    /// When the shard has ended.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.thread.is_finished() {
            return Err(ended());
        }
        Ok(())
    }

    /// Hands a queue to the shard; it counts as a connection.
    ///
    /// # Errors
    /// When the shard has ended.
    pub(crate) fn assign(&self, queue: Command) -> Result<(), Error> {
        self.inbox.counted();
        self.hand(queue).inspect_err(|_| self.inbox.closed())
    }
}

/// Starts all shards or none.
pub(crate) fn start_shards(
    count: usize,
    poll_us: u32,
    probe: &sheave_ring::Probe,
    clock: Clock,
) -> io::Result<Vec<ShardHandle>> {
    let count = count.max(1);
    let mut shards = Vec::with_capacity(count);
    for index in 0..count {
        match start_shard(index, probe, poll_us, clock) {
            Ok(shard) => shards.push(shard),
            Err(error) => {
                stop_shards(shards);
                return Err(error);
            }
        }
    }
    Ok(shards)
}

pub(crate) fn stop_shards(shards: Vec<ShardHandle>) {
    for shard in &shards {
        // A shard that has ended needs no command.
        let _ = shard.hand(Command::Stop);
    }
    for shard in shards {
        // A panic has been reported by the thread itself.
        let _ = shard.thread.join();
    }
}

/// Names the limit that an error of io_uring_setup(2), eventfd(2) or clone(2) is about, and how to
/// raise it.
pub(crate) fn limit_of(error: &io::Error) -> String {
    let of = |resource| match getrlimit(resource).current {
        Some(limit) => limit.to_string(),
        None => "unlimited".to_owned(),
    };
    let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    if is(Errno::NOMEM) {
        let limit = of(Resource::Memlock);
        // Linux 5.12 and later count rings as memory of the control group instead.
        return format!(
            " (RLIMIT_MEMLOCK is {limit} bytes: `ulimit -l`, LimitMEMLOCK= in a unit; or the \
             control group has no memory left)"
        );
    }
    if is(Errno::MFILE) {
        let limit = of(Resource::Nofile);
        return format!(" (RLIMIT_NOFILE is {limit}: `ulimit -Hn`, LimitNOFILE= in a unit)");
    }
    String::new()
}

fn start_shard(
    index: usize,
    probe: &sheave_ring::Probe,
    poll_us: u32,
    clock: Clock,
) -> io::Result<ShardHandle> {
    let inbox = Arc::new(Inbox::new()?);
    let (mine, probe) = (Arc::clone(&inbox), probe.clone());
    let poll_limit = u64::from(poll_us) * 1000;
    let (started, outcome) = sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("shard-{index}")).spawn(move || {
        // A ring can only be used by the thread that makes it.
        let shard = match Shard::new(&probe, poll_limit, clock, mine) {
            Ok(shard) => shard,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        // Only our own bugs make a ring fail. The process ends, since clients of a missing shard
        // would wait for ever.
        shard.run().expect("the ring works");
    })?;
    outcome.recv().map_err(|_| io::Error::other("shard thread ended early"))??;
    Ok(ShardHandle { inbox, thread })
}

pub(crate) fn ended() -> Error {
    Error::new(ErrorKind::Io, "serve", "a shard has ended")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_limit_names_it() {
        let limit = |errno: Errno| limit_of(&errno.into());
        assert!(limit(Errno::NOMEM).contains("RLIMIT_MEMLOCK is "));
        assert!(limit(Errno::MFILE).contains("RLIMIT_NOFILE is "));
        assert_eq!(limit(Errno::PERM), "");
    }
}
