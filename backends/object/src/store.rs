//! A store of objects: the four things that the engine asks of it.
//!
//! An object is made once and never changed. A store must be strongly consistent: an object that
//! was made is found and listed from then on. `create` must be atomic: of several at the same time
//! exactly one makes the object.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use sheave_core::printable;

/// The future of a store's answer.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// The answer to a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is made, on stable storage.
    Made,
    /// An object of this name exists, and is on stable storage. It may have been made by an earlier
    /// try whose answer was lost.
    Exists,
}

/// An object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its key.
    pub key: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Where objects are kept. Keys are relative to the volume: `root/…`, `log/…/…`.
pub trait Store: fmt::Debug + Send + Sync {
    /// Makes an object, if there is none of that name.
    ///
    /// Every error but [`StoreErrorKind::Denied`] leaves unknown whether the object is made, and
    /// whether it will be later.
    fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created>;

    /// The bytes of an object in a range; fewer where the object ends before.
    fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes>;

    /// The first `max` objects whose keys begin with `prefix` and are greater than `after`, sorted
    /// by the bytes of their keys. What it lists is on stable storage.
    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, max: usize) -> Answer<'a, Vec<Listed>>;

    /// Deletes an object, if it exists. The deletion may be lost by a crash of the store.
    fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()>;

    /// The objects of another volume beside this one, whose place differs in the last part only;
    /// `None` if it has none.
    fn sibling(&self, name: &str) -> Option<Arc<dyn Store>> {
        let _ = name;
        None
    }
}

/// What the caller can do about a store's error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// There is no such object.
    NotFound,
    /// No answer, or a refusal that passes: try again.
    Busy,
    /// The store refuses this client: try again for minutes, then say it.
    Denied,
    /// Trying again is of no use: the request or the store is wrong.
    Broken,
}

/// A store's error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreError {
    /// What the caller can do.
    pub kind: StoreErrorKind,
    /// What the store said, in one line.
    pub why: String,
}

impl StoreError {
    /// An error of that kind.
    #[must_use]
    pub fn new(kind: StoreErrorKind, why: impl Into<String>) -> Self {
        Self { kind, why: why.into() }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A store's words come from outside.
        write!(f, "{}", printable(&self.why))
    }
}

impl std::error::Error for StoreError {}
