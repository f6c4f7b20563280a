//! Certificates, keys and revocation lists that change while they are used.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sheave_core::Error;
use sheave_nbd::TlsConfig;
use sheave_tls::{TlsFiles, server_tls};
use tokio::task::spawn_blocking;

/// How often the files are looked at. They are read when two looks have found them the same.
const LOOK_PERIOD: Duration = Duration::from_millis(250);
/// How long files that do not fit together may be in the middle of a change.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What tells the content of a file from what it was: device, inode, size, and times of change.
type Stamp = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;
/// Of all files.
pub(crate) type Stamps = Vec<Stamp>;

/// The files of a server's certificate, and what is known about them.
pub(crate) struct TlsWatch {
    files: TlsFiles,
    /// As they are used, or as they were given up.
    known: Stamps,
    /// At the last look.
    seen: Stamps,
    /// Since when they do not fit together.
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
    /// Why what there is now cannot be used, after [`CHANGE_TIMEOUT`]. Said once for each change.
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
                // As they were before they were read.
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
