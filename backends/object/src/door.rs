//! The door of an open volume, through which another process of this node asks for something: a
//! snapshot, for example, while a server has the volume.
//!
//! It is a socket `control` in the volume's directory on this node. A request is a line of JSON,
//! and its answer is one. [`Command`] has all requests.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sheave_core::{Error, ErrorKind, Result, printable};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

use crate::ask::{Ask, ChangeAsk, Done};
use crate::format::Durability;
use crate::head::Change;
use crate::ids::{BLOCK_BYTES, Blocks};
use crate::life::{self, RootChange};
use crate::retry::Requests;
use crate::snapshots::{self, Roots};
use crate::stored::{incarnation, node};
use crate::volume::Engine;

/// The name of the socket.
pub(crate) const SOCKET: &str = "control";
/// The longest request, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What is asked of an open volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Make a snapshot of all that was written.
    Snapshot {
        /// Its name.
        name: String,
    },
    /// Delete a snapshot.
    DeleteSnapshot {
        /// Its name.
        name: String,
    },
    /// Make the volume longer.
    Resize {
        /// Its new size.
        blocks: Blocks,
    },
    /// Change what flushes wait for, from the next one on.
    SetDurability {
        /// The name of a [`Durability`].
        durability: String,
    },
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    /// It is done, with what is to be known of it.
    Done(Value),
    /// It is not done, and why.
    Failed { kind: String, why: String },
}

impl Reply {
    fn of(outcome: Result<Value>) -> Self {
        match outcome {
            Ok(value) => Self::Done(value),
            Err(error) => {
                Self::Failed { kind: error.kind().name().to_owned(), why: error.to_string() }
            }
        }
    }
}

/// Asks the process of this node that has the volume open, whose directory that is, and waits for
/// the outcome. `None` if there is none.
///
/// # Errors
/// Those of the command, and [`ErrorKind::Io`] when the other process ends before it answers.
pub fn call(dir: &Path, command: &Command) -> Result<Option<Value>> {
    let failed = |error| Error::from_io("ask", printable(&dir.join(SOCKET)).to_string(), error);
    let opened = File::open(dir).and_then(|dir| UnixStream::connect(short_path(&dir)));
    let mut stream = match opened {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(failed(error)),
            };
        }
    };
    let mut line = serde_json::to_vec(command).map_err(|error| failed(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(failed)?;
    let reply = serde_json::from_str(&line).map_err(|_| {
        let why = "the process that has the volume open has ended before it has answered";
        Error::new(ErrorKind::Io, "ask", format!("{}: {why}", printable(dir)))
    })?;
    match reply {
        Reply::Done(value) => Ok(Some(value)),
        Reply::Failed { kind, why } => {
            let kind = ErrorKind::ALL.into_iter().find(|known| known.name() == kind);
            Err(Error::new(kind.unwrap_or(ErrorKind::Io), "ask", why))
        }
    }
}

/// Answers what is asked of a volume, as long as it is open.
pub(crate) async fn attend(engine: Arc<Engine>, requests: Requests) {
    let outcome = match engine.dir() {
        Some(dir) => listen(&dir).and_then(tokio::net::UnixListener::from_std),
        None => return,
    };
    let listener = match outcome {
        Ok(listener) => listener,
        Err(error) => {
            let volume = requests.name();
            tracing::warn!(volume, %error, "nothing can be asked of it while it is open");
            return;
        }
    };
    // An error is of one connection.
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(Arc::clone(&engine), requests.clone(), stream));
        }
    }
}

/// Makes the socket. What is there is of a process that was killed: the directory is locked.
fn listen(dir: &Path) -> io::Result<UnixListener> {
    let socket = dir.join(SOCKET);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(short_path(&File::open(dir)?))?;
    fs::set_permissions(&socket, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A path to the socket that is short enough for an address, however long that of the directory is.
fn short_path(dir: &File) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(SOCKET)
}

impl Roots for Engine {
    fn change(&self, change: Change) -> Pin<Box<dyn Future<Output = Result<()>> + Send + '_>> {
        let ask = |done| Ask::Change(ChangeAsk { change, done });
        Box::pin(asked(self, move |done| self.with(|front| front.ask(ask(done)))))
    }
}

async fn answer(engine: Arc<Engine>, requests: Requests, stream: tokio::net::UnixStream) {
    let mut stream = tokio::io::BufReader::new(stream.take(LINE_BYTES_MAX));
    let mut line = String::new();
    if stream.read_line(&mut line).await.is_err() {
        return;
    }
    let outcome = match serde_json::from_str(&line) {
        Ok(command) => obey(&engine, &requests, command).await,
        Err(error) => {
            let why = format!("a request that it does not know: {error}");
            Err(requests.error(ErrorKind::Unsupported, "ask", "", &why))
        }
    };
    let Ok(mut line) = serde_json::to_vec(&Reply::of(outcome)) else { return };
    line.push(b'\n');
    // The caller may be gone.
    drop(stream.into_inner().into_inner().write_all(&line).await);
}

/// Does what is asked.
pub(crate) async fn obey(engine: &Engine, requests: &Requests, command: Command) -> Result<Value> {
    match command {
        Command::Snapshot { name } => {
            let at_ms = now_ms();
            let snapshot =
                asked(engine, |done| engine.with(|front| front.ask_snapshot(name, at_ms, done)));
            snapshot.await.map(|snapshot| json!({ "name": snapshot.name, "id": snapshot.id }))
        }
        Command::DeleteSnapshot { name } => {
            let (incarnation, node) = (incarnation()?, node());
            snapshots::delete(requests, &name, (incarnation, &node), engine).await?;
            Ok(json!({}))
        }
        Command::Resize { blocks } => {
            life::check_size(requests, blocks)?;
            change_root(engine, life::to_size(blocks)).await?;
            engine.has_grown(blocks * BLOCK_BYTES);
            Ok(json!({}))
        }
        Command::SetDurability { durability: name } => {
            let found = Durability::ALL.into_iter().find(|known| known.name() == name);
            let why = "a durability that it does not know";
            let unknown = || requests.error(ErrorKind::Unsupported, "set", "", why);
            let durability = found.ok_or_else(unknown)?;
            change_root(engine, life::to_durability(durability)).await?;
            engine.with(|front| front.set_durability(durability));
            Ok(json!({}))
        }
    }
}

async fn change_root(engine: &Engine, change: RootChange) -> Result<()> {
    engine.change(Arc::new(move |head| change(&mut head.root))).await
}

/// Asks the uploads for something, and waits for the outcome.
async fn asked<T: Send + 'static>(
    engine: &Engine,
    ask: impl FnOnce(Done<T>) -> Result<()>,
) -> Result<T> {
    let (done, outcome) = oneshot::channel();
    ask(Box::new(move |outcome| drop(done.send(outcome))))?;
    outcome.await.unwrap_or_else(|_| {
        let why = format!("{}: the volume is no longer open here; try again", engine.name);
        Err(Error::new(ErrorKind::Shutdown, "ask", why))
    })
}

/// The time, in milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
