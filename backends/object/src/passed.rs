//! Which stores this node has probed, and when. Each has a small file beside the journals.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sheave_core::Result;

/// Where the files are, in the directory of journals.
const DIR: &str = "probed";
/// A store is probed again after a day, as another program may serve the bucket by then. The window
/// matters only while two nodes write, so it does not need to be short.
const VALID: Duration = Duration::from_secs(24 * 3600);

/// What this node knows of a store.
#[derive(Debug)]
pub(crate) struct Passed<'a> {
    path: PathBuf,
    store: &'a str,
}

#[derive(Debug, Deserialize, Serialize)]
struct Record {
    store: String,
    /// Since 1970.
    passed_s: u64,
}

impl<'a> Passed<'a> {
    /// Of the store that this text tells from others.
    pub(crate) fn of(journals: &Path, store: &'a str) -> Self {
        // Another store may have the same number; the record has the text.
        let number = crc32fast::hash(store.as_bytes());
        Self { path: journals.join(DIR).join(format!("{number:08x}")), store }
    }

    /// Whether it has passed within a day.
    pub(crate) fn is_recent(&self) -> bool {
        let Ok(Some(Record { store, passed_s })) = sheave_durable::read::<Record>(&self.path)
        else {
            return false;
        };
        // One that is to come is of a clock that was wrong.
        let age_s = now_s().checked_sub(passed_s);
        store == self.store && age_s.is_some_and(|age_s| age_s < VALID.as_secs())
    }

    /// Notes that it has passed just now.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn note(&self) -> Result<()> {
        if let Some(dir) = self.path.parent() {
            let failed = |error| {
                sheave_core::Error::from_io("make", sheave_core::printable(dir).to_string(), error)
            };
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        sheave_durable::replace(
            &self.path,
            &Record { store: self.store.to_owned(), passed_s: now_s() },
        )
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_passed_is_known_for_a_day_and_for_this_store_only() {
        let dir = tempfile::tempdir().unwrap();
        let passed = Passed::of(dir.path(), "bucket b at http://a");
        assert!(!passed.is_recent());
        passed.note().unwrap();
        assert!(passed.is_recent());
        let other = Passed { path: passed.path.clone(), store: "bucket b at http://c" };
        assert!(!other.is_recent(), "another store of that number");
        for (age_s, is_recent) in [(VALID.as_secs() - 60, true), (VALID.as_secs(), false)] {
            let record = Record { store: passed.store.to_owned(), passed_s: now_s() - age_s };
            sheave_durable::replace(&passed.path, &record).unwrap();
            assert_eq!(passed.is_recent(), is_recent, "{age_s}");
        }
        let record = Record { store: passed.store.to_owned(), passed_s: now_s() + 60 };
        sheave_durable::replace(&passed.path, &record).unwrap();
        assert!(!passed.is_recent(), "the clock was wrong");
        std::fs::write(&passed.path, "{").unwrap();
        assert!(!passed.is_recent(), "a damaged record");
    }
}
