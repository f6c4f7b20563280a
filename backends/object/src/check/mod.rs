//! Verifies a volume without opening it: nothing is claimed, and nothing is written.
//!
//! ```text
//!  roots ─▶ newest root ─▶ checkpoint and tail ─▶ listing ─▶ leaves ─▶ frames ─▶ headers
//! ```
//!
//! The writer of an open volume deletes what its newest root does not need. So what seems to be
//! faulty there is looked at again by the newest root, until no newer one comes in between.

mod counts;
mod faults;
mod frames;
mod objects;
mod roots;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeSet;

use sheave_core::Result;

pub use self::faults::Fault;
use self::objects::Pass;
use crate::cipher::WrappingKey;
use crate::format::{Root, keys};
use crate::ids::Seq;
use crate::open::{find, unlock};
use crate::retry::Requests;

/// Requests at the same time.
const READS_MAX: usize = 8;
/// Keys of a listing.
const LISTED_MAX: usize = 1 << 16;
/// How often faults of an open volume are looked at again.
const TRIES_MAX: usize = 8;
/// What is wrong with an object that is not there.
const MISSING: &str = "the object is missing; something else has deleted it";

/// What a check does.
pub struct Options<'a> {
    /// Whether it reads the data, too, and not only what is needed to find them.
    pub reads_data: bool,
    /// Whether it removes objects that came too late, which nothing can need.
    pub repairs: bool,
    /// What unlocks the key of the volume, if it is encrypted.
    pub key: Option<WrappingKey>,
    /// Is called now and then.
    pub progress: &'a (dyn Fn(Progress) + Sync),
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes of data that were read.
    pub read_bytes: u64,
    /// The most bytes that there are to read.
    pub all_bytes: u64,
}

/// Objects and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Their count.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What a check has found.
#[derive(Debug)]
pub struct Report {
    /// The newest root, which it is about; `None` if that is damaged.
    pub root: Option<Root>,
    /// Whether the data were read, too.
    pub has_read_data: bool,
    /// Bytes of data that were read.
    pub read_bytes: u64,
    /// Bytes of the volume that are in objects.
    pub live_bytes: u64,
    /// Log objects that the volume needs.
    pub needed: Sum,
    /// Log objects that it does not need any more.
    pub dead: Sum,
    /// Log objects that came after another opening had begun in their place, and never counted.
    pub late: Sum,
    /// How many of them were removed.
    pub removed: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
}

impl Sum {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// Checks a volume, which may be open.
///
/// # Errors
/// [`NotFound`](sheave_core::ErrorKind::NotFound) when there is none,
/// [`Unsupported`](sheave_core::ErrorKind::Unsupported) when a newer program has written it,
/// [`Invalid`](sheave_core::ErrorKind::Invalid) when the key does not fit, and those of the store.
/// Faults of what is stored are no errors.
pub async fn check(requests: &Requests, options: &Options<'_>) -> Result<Report> {
    let mut suspects: Option<BTreeSet<Seq>> = None;
    for tries_left in (0..TRIES_MAX).rev() {
        let mut pass = Pass::new(requests, options, suspects.as_ref());
        let newest = match find(requests).await {
            Ok(newest) => Some(newest),
            Err(error) => {
                pass.faults.add_error(requests, keys::ROOTS, error)?;
                None
            }
        };
        let is_whole = match &newest {
            Some(newest) => {
                pass.key = unlock(requests, newest, options.key.as_ref())?;
                pass.run(newest).await?
            }
            None => false,
        };
        let is_final = pass.faults.is_empty()
            || tries_left == 0
            || newest.as_ref().is_none_or(|newest| newest.last.is_closed)
            || is_newest(requests, newest.as_ref()).await?;
        if !is_final {
            suspects = if is_whole { Some(pass.faults.seqs()) } else { suspects };
            continue;
        }
        if !is_whole {
            pass.check_alone(newest.as_ref()).await?;
        }
        return pass.finish(newest).await;
    }
    unreachable!("the last try is final")
}

/// Whether no newer root has come.
async fn is_newest(requests: &Requests, root: Option<&Root>) -> Result<bool> {
    let listed = requests.list(keys::ROOTS, "", 1).await?;
    let newest = listed.first().map(|listed| &listed.key);
    Ok(newest == root.map(|root| keys::root(root.number)).as_ref())
}
