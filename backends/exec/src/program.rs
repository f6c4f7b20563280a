//! A program for its user: a socket to connect to, and the reason why it ended.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Builder;

use rustix::pipe::{PipeFlags, pipe_with};
use sheave_core::{Error, ErrorKind, Result, printable};

use crate::socket::Socket;
use crate::start::{Start, by_helper};
use crate::watch::Watch;

/// What to run.
#[derive(Clone, Debug)]
pub struct ProgramOptions {
    /// A command for `/bin/sh`, to follow `exec`.
    pub command: String,
    /// The directory to run it in; by default that of this process.
    pub directory: Option<PathBuf>,
    /// How to start it: [`by_helper`].
    pub launch: fn(Start) -> io::Result<Child>,
}

impl ProgramOptions {
    /// Runs a command in the directory of this process.
    #[must_use]
    pub fn new(command: impl Into<String>) -> Self {
        Self { command: command.into(), directory: None, launch: by_helper }
    }
}

/// A program that serves NBD. Dropping this asks it to end, and does not wait.
pub struct Program {
    shared: Arc<Shared>,
}

/// State that a program and its thread share.
pub(crate) struct Shared {
    pub(crate) socket: Socket,
    /// Closing this end of a pipe ends the program.
    stop: Mutex<Option<OwnedFd>>,
    /// Why the program ended the last time.
    last_words: Mutex<Option<String>>,
}

impl Program {
    /// Makes the socket. The program starts with the first connection.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a command that is empty or holds a zero byte, and when there is
    /// no socket or thread.
    pub fn new(options: ProgramOptions) -> Result<Self> {
        let command = &options.command;
        let refused = |why| Err(Error::new(ErrorKind::Invalid, "start program", why));
        if command.trim().is_empty() {
            return refused("the command is empty");
        }
        if command.contains('\0') {
            return refused("the command holds a zero byte");
        }
        let name = printable(command).to_string();
        let failed = |error: io::Error| Error::from_io("start program", name.clone(), error);
        let socket = Socket::new().map_err(failed)?;
        let (stopped, stop) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let shared =
            Arc::new(Shared { socket, stop: Mutex::new(Some(stop)), last_words: Mutex::new(None) });
        let running = Running::begin(&shared);
        let watch = Watch::new(Arc::clone(&shared), stopped, options);
        let thread = Builder::new().name("program".to_owned());
        let run = move || {
            watch.run();
            drop(running);
        };
        thread.spawn(run).map_err(failed)?;
        Ok(Self { shared })
    }

    /// The path that connect(2) takes, in this process only.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.shared.socket.path()
    }

    /// Why the program ended the last time: the last line that it printed, and its exit status.
    #[must_use]
    pub fn last_words(&self) -> Option<String> {
        lock(&self.shared.last_words).clone()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("socket", &self.shared.socket).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn set_last_words(&self, words: String) {
        *lock(&self.last_words) = Some(words);
    }

    fn stop(&self) {
        drop(lock(&self.stop).take());
    }
}

/// The programs whose threads have not ended.
static RUNNING: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
static ENDED: Condvar = Condvar::new();

/// Counts a program while its thread runs.
struct Running(Weak<Shared>);

impl Running {
    fn begin(shared: &Arc<Shared>) -> Self {
        let weak = Arc::downgrade(shared);
        lock(&RUNNING).push(Weak::clone(&weak));
        Self(weak)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&RUNNING).retain(|other| !Weak::ptr_eq(other, &self.0));
        ENDED.notify_all();
    }
}

/// Asks all programs of this process to end, and waits for them. A program that does not end in
/// time is killed, so this returns within seconds. Call it at the end of the process.
pub fn end_all() {
    let mut running = lock(&RUNNING);
    for shared in running.iter().filter_map(Weak::upgrade) {
        shared.stop();
    }
    while !running.is_empty() {
        running = ENDED.wait(running).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is a single assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
