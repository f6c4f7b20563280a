//! What this node keeps of a volume that Docker knows: one file each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use prost_types::Timestamp;
use serde::{Deserialize, Serialize};
use sheave_core::printable;
use sheave_durable as durable;
use sheave_node::{Error, Kind, Result, boot_id};

use crate::Caller;
use crate::lock::RecordsLock;
use crate::options::Given;

/// What this program writes and reads.
const FORMAT: u32 = 1;
/// Characters of a name: a file is called by it.
const NAME_LEN_MAX: usize = 128;
/// How long Docker may take to start a container after it has mounted a volume: it mounts others,
/// and waits two minutes for each.
const DOUBT: Duration = Duration::from_secs(300);
/// Bytes of the id of a reference. Docker's have 64.
const ID_LEN_MAX: usize = 256;
/// References of a volume: a record with more could become too long to be read again.
const REFERENCES_MAX: usize = 1000;

/// A volume that Docker knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    format: u32,
    pub(crate) name: String,
    /// POOL/UUID.
    pub(crate) volume: String,
    /// It was there before, so it is not deleted with its name.
    pub(crate) adopted: bool,
    pub(crate) options: Given,
    /// The ids by which Docker mounts it.
    pub(crate) references: BTreeMap<String, Reference>,
    /// Which start of the node the references are from: no container outlives it.
    pub(crate) boot: String,
    /// When Docker got it, as in RFC 3339; empty if that is not known.
    pub(crate) created: String,
}

/// An id by which Docker mounts a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reference {
    /// The process that has asked for it.
    #[serde(flatten)]
    pub(crate) caller: Caller,
    /// The number of the call whose answer is still on its way; none once Docker has it.
    pub(crate) unanswered: Option<u64>,
}

impl Record {
    pub(crate) fn new(name: &str, volume: String, adopted: bool, options: Given) -> Self {
        let name = name.to_owned();
        Self {
            format: FORMAT,
            name,
            volume,
            adopted,
            options,
            references: BTreeMap::new(),
            boot: boot_id(),
            created: now(),
        }
    }

    /// Checks that one more container may have the volume, which mounts it by this id.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an id that is none, and [`Kind::Exhausted`].
    pub(crate) fn check_reference(&self, id: &str) -> Result<()> {
        check_id(id)?;
        if self.references.len() < REFERENCES_MAX || self.references.contains_key(id) {
            return Ok(());
        }
        let why = format!(
            "volume {} is in use by {REFERENCES_MAX} containers, which is the most; remove some",
            self.name
        );
        Err(Error::new(Kind::Exhausted, why))
    }
}

/// The present time, as in RFC 3339.
pub(crate) fn now() -> String {
    Timestamp { nanos: 0, ..SystemTime::now().into() }.to_string()
}

impl Reference {
    /// Whether Docker may never have got to know it: the plugin that had the call, before the one
    /// whose first call this is, has ended before the answer was handed over.
    pub(crate) fn is_doubtful(&self, first_call: u64) -> bool {
        self.unanswered.is_some_and(|call| call < first_call)
    }

    /// Whether it is of no use unless a container has the volume, for a plugin of this age.
    pub(crate) fn is_stale(&self, first_call: u64, age: Duration) -> bool {
        self.caller.has_ended() || self.is_doubtful(first_call) && age >= DOUBT
    }
}

/// The directory of all records, for as long as it is locked.
pub(crate) struct Records {
    dir: PathBuf,
    _lock: RecordsLock,
}

impl Records {
    /// Waits for another plugin that is about to end.
    ///
    /// # Errors
    /// When it cannot be made, or another plugin keeps it.
    pub(crate) fn open(dir: PathBuf) -> Result<Self> {
        let made = fs::create_dir_all(&dir);
        made.map_err(|error| Error::of_io(format!("make {}", printable(&dir)), &error))?;
        let lock = RecordsLock::take(&dir)?;
        let records = Self { dir, _lock: lock };
        records.keep_spare();
        Ok(records)
    }

    /// # Errors
    /// When it is damaged or cannot be read.
    pub(crate) fn load(&self, name: &str) -> Result<Option<Record>> {
        read(&self.path(name))
    }

    /// On a full disk only records that are there can be written.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn save(&self, record: &Record) -> Result<()> {
        let saved = durable::replace(&self.path(&record.name), record).map_err(unavailable);
        self.keep_spare();
        saved
    }

    /// So that containers can be ended when there is no room. An earlier change may have used it
    /// up.
    fn keep_spare(&self) {
        let _ = durable::keep_spare(&self.dir);
    }

    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        durable::remove(&self.path(name)).map_err(unavailable)
    }

    /// All that can be read, by name. Of another one, the log says why.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn all(&self) -> Result<Vec<Record>> {
        Ok(self.read_all()?.0)
    }

    /// The same, and whether they are all that there are.
    pub(crate) fn read_all(&self) -> Result<(Vec<Record>, bool)> {
        let fail = |error| Error::of_io(printable(&self.dir), &error);
        let (mut all, mut are_all) = (Vec::new(), true);
        for entry in fs::read_dir(&self.dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.extension().is_some_and(|kind| kind == "json") {
                match read(&path) {
                    Ok(record) => all.extend(record),
                    Err(error) => {
                        are_all = false;
                        tracing::warn!("a volume is left out: {error}");
                    }
                }
            }
        }
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok((all, are_all))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }
}

fn read(path: &Path) -> Result<Option<Record>> {
    let record: Option<Record> = durable::read(path).map_err(unavailable)?;
    match &record {
        Some(record) if path.file_stem().is_none_or(|stem| stem != record.name.as_str()) => {
            let (path, name) = (printable(path), &record.name);
            let why = format!("{path} is about volume {name}; restore it, or move it away");
            Err(Error::new(Kind::Unavailable, why))
        }
        Some(record) if record.format != FORMAT => {
            let why = format!("{} has format {}", printable(path), record.format);
            Err(Error::new(Kind::Unavailable, why))
        }
        _ => Ok(record),
    }
}

fn unavailable(error: sheave_core::Error) -> Error {
    Error::new(Kind::Unavailable, format!("record of a Docker volume: {error}"))
}

/// Checks a name: that of a volume is also that of a file and of a directory.
///
/// # Errors
/// [`Kind::Invalid`].
pub(crate) fn check_name(name: &str) -> Result<()> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins_well && name.len() <= NAME_LEN_MAX && name.chars().all(is_plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_LEN_MAX).collect();
    let why = format!(
        "{shown:?} is no name of a volume: 1 to {NAME_LEN_MAX} letters, digits, _, . and -, of \
         which the first is a letter or digit"
    );
    Err(Error::new(Kind::Invalid, why))
}

/// Checks the id of a reference: a record with longer ones could not be read again.
///
/// # Errors
/// [`Kind::Invalid`].
fn check_id(id: &str) -> Result<()> {
    match id.len() {
        1..=ID_LEN_MAX => Ok(()),
        len => {
            let why = format!("an ID has 1 to {ID_LEN_MAX} bytes, and this one {len}");
            Err(Error::new(Kind::Invalid, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_whole_or_not_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::open(dir.path().join("docker")).expect("a directory");
        let mut record = Record::new("db", "fast/1".to_owned(), false, Given::new());
        assert_eq!(records.load("db").expect("none"), None);
        let reference = Reference { caller: Caller::of(1), unanswered: Some(2) };
        record.references.insert("1".to_owned(), reference);
        records.save(&record).expect("saved");
        assert_eq!(records.load("db").expect("a record").as_ref(), Some(&record));
        let other = dir.path().join("docker/other.json");
        for text in ["{", &fs::read_to_string(records.path("db")).expect("a record")] {
            fs::write(&other, text).expect("written");
            assert_eq!(records.all().expect("all"), std::slice::from_ref(&record));
            assert!(records.load("other").is_err());
        }
        records.remove("db").expect("removed");
        assert_eq!(records.load("db").expect("none"), None);
    }

    #[test]
    fn a_reference_is_doubtful_if_its_plugin_has_ended_before_the_answer() {
        let of_this = Caller::of(std::process::id());
        let reference = |unanswered| Reference { caller: of_this, unanswered };
        let is_stale = |unanswered, age| reference(unanswered).is_stale(5, age);
        assert!(is_stale(Some(4), DOUBT));
        assert!(!is_stale(Some(4), DOUBT - Duration::from_secs(1)), "it may be about to start");
        assert!(!is_stale(Some(5), DOUBT), "a call of this plugin");
        assert!(!is_stale(None, DOUBT));
    }

    #[test]
    fn names_are_no_paths() {
        for name in ["db", "a.b-c_d", "0", &"n".repeat(128)] {
            check_name(name).expect(name);
        }
        for name in ["", ".", "..", "a/b", "../a", ".a", "-a", "a b", "ü", &"n".repeat(129)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_record_with_as_many_references_as_there_may_be_is_read_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::open(dir.path().to_owned()).expect("a directory");
        let mut record = Record::new("db", "fast/1".to_owned(), false, Given::new());
        let id = |number: usize| format!("{number:0>256}").replace('0', "\u{1}");
        let reference = Reference { caller: Caller::of(1), unanswered: Some(u64::MAX) };
        while record.check_reference(&id(record.references.len())).is_ok() {
            record.references.insert(id(record.references.len()), reference);
        }
        assert_eq!(record.references.len(), REFERENCES_MAX);
        assert!(record.check_reference(&id(0)).is_ok(), "one that is there");
        records.save(&record).expect("saved");
        assert_eq!(records.load("db").expect("a record"), Some(record));
    }

    #[test]
    fn ids_are_short() {
        for id in ["1", &"i".repeat(256)] {
            check_id(id).expect(id);
        }
        for id in ["", &"i".repeat(257)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
