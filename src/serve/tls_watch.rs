//! Certificates, keys and revocation lists that change while they are used.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sheave_core::Error;
use sheave_nbd::TlsConfig;
use sheave_tls::{TlsFiles, server_tls};
use tokio::task::spawn_blocking;

/// How often the files are checked. They are read when two checks have found the same stamps.
const LOOK_PERIOD: Duration = Duration::from_millis(250);
/// How long inconsistent files may be in the middle of a change.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The stamp of a file, which changes with its content: device, inode, size, and times of change.
type Stamp = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;
/// Of all files.
pub(crate) type Stamps = Vec<Stamp>;

/// The files of a server's certificate, and their states.
pub(crate) struct TlsWatch {
    files: TlsFiles,
    /// The stamps of the files in use, or of those that were refused.
    known: Stamps,
    /// The stamps at the last check.
    seen: Stamps,
    /// Since when they are inconsistent.
    wrong_since: Option<Instant>,
}

impl TlsWatch {
    /// The files had these stamps before they were read.
    pub(crate) fn new(files: TlsFiles, known: Stamps) -> Self {
        Self { files, seen: known.clone(), known, wrong_since: None }
    }

    /// Waits for another certificate, key, authority or revocation list, and reads it.
    ///
    /// # Errors
    /// Why the present files cannot be used, after [`CHANGE_TIMEOUT`]. Returned once for each
    /// change.
    pub(crate) async fn changed(&mut self) -> Result<Arc<TlsConfig>, Error> {
        loop {
            tokio::time::sleep(LOOK_PERIOD).await;
            let files = self.files.clone();
            let Ok(now) = spawn_blocking(move || stamps(&files)).await else { continue };
            let is_settled = now == self.seen;
            self.seen = now;
            if self.seen == self.known {
                self.wrong_since = None;
            }
            if !is_settled || self.seen == self.known {
                continue;
            }
            let files = self.files.clone();
            let Ok(read) = spawn_blocking(move || server_tls(&files)).await else { continue };
            let since = *self.wrong_since.get_or_insert_with(Instant::now);
            if read.is_ok() || since.elapsed() >= CHANGE_TIMEOUT {
                // The stamps from before reading.
                self.known.clone_from(&self.seen);
                self.wrong_since = None;
                return read;
            }
        }
    }
}

/// The stamps of all files as they are now.
pub(crate) fn stamps(files: &TlsFiles) -> Stamps {
    files.paths().map(stamp).collect()
}

fn stamp(path: &Path) -> Stamp {
    let found = path.metadata().ok()?;
    let (modified, changed) =
        ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()));
    Some((found.dev(), found.ino(), found.size(), modified, changed))
}
