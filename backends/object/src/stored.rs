//! Volumes by the stores that they are in.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use sheave_core::{Error, ErrorKind, Result, printable};
use uuid::Uuid;

use crate::check;
use crate::cipher::WrappingKey;
use crate::clock::SystemClock;
use crate::clones::{self, NewClone};
use crate::door::{self, Command};
use crate::format::{Codec, Durability, NODE_BYTES_MAX, Root, State};
use crate::head::Change;
use crate::ids::{BLOCK_BYTES, Blocks, Incarnation, VolumeId};
use crate::journal::{JournalDir, JournalSize};
use crate::key_source::KeySource;
use crate::life::{self, Info, NewVolume};
use crate::open::{Request, find, find_any};
use crate::passed::Passed;
use crate::probe;
use crate::restore::restore;
use crate::retry::Requests;
use crate::snapshots::{self, ClosedRoots};
use crate::store::{Answer, Store};
use crate::threads::block_on;
use crate::volume::{
    CLOSING_TIMEOUT, ObjectVolume, Tuning, find_snapshot, finish_closing, snapshot_identity,
};
use crate::worker::salts;

/// How sure it is that of several creations of an object one succeeds, which keeps the second of
/// two writers out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fencing {
    /// The kernel of this node does it.
    Sure,
    /// The store says so, and is probed. The text tells it from other stores.
    Probed(String),
    /// It is not so, and the operator knows it.
    None,
}

/// A store that has the objects of one volume, or will have them.
pub trait VolumeStore: Store {
    /// How sure creations are.
    fn fencing(&self) -> Fencing;

    /// What tells its place from others, however it is written; `None` if that is not known.
    fn place(&self) -> Option<String>;

    /// Where its place is, and its name there. Volumes of one place can be clones of one another.
    /// `None` if that is not known, or the name is no text.
    fn home(&self) -> Option<(String, String)>;

    /// The last parts of the places beside this one that may have volumes, this one among them, in
    /// order. There may be more than `max`, which are left out.
    fn siblings(&self, max: usize) -> Answer<'_, Vec<String>>;

    /// Makes it ready for the first object of a volume.
    ///
    /// # Errors
    /// When it cannot have a volume.
    fn make(&self) -> Result<()> {
        Ok(())
    }

    /// Removes what killed processes have left unfinished.
    ///
    /// # Errors
    /// Those of the store.
    fn sweep(&self) -> Result<()> {
        Ok(())
    }
}

/// A volume in a store, which may not exist.
#[derive(Clone, Debug)]
pub struct StoredVolume {
    /// Its name in messages. No other volume has it.
    pub name: String,
    /// Where its objects are.
    pub store: Arc<dyn VolumeStore>,
    /// Where this node keeps journals; each volume's is in a directory of its id.
    pub journals: PathBuf,
    /// Where its key is, if it is encrypted.
    pub key: Option<KeySource>,
    /// The name of its snapshot, if that is meant.
    pub snapshot: Option<String>,
}

impl StoredVolume {
    /// Makes it, encrypted if it has a key. A size is whole blocks of 4 KiB.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when there is one, [`ErrorKind::Invalid`] for a size that cannot be,
    /// and those of the store.
    pub fn create(&self, size_bytes: u64, codec: Codec, durability: Durability) -> Result<()> {
        let requests = self.requests();
        let key = self.wrapping_key()?;
        // Before anything is made.
        let size = blocks_of(&requests, size_bytes)?;
        self.store.make()?;
        self.check_store(&requests, false)?;
        let new = NewVolume {
            volume: VolumeId(Uuid::now_v7().into_bytes()),
            incarnation: incarnation()?,
            node: node(),
            size,
            durability,
            codec,
            key,
        };
        block_on(life::create(&requests, &new)).map(drop)
    }

    /// Sets what its flushes wait for from now on. It may be open on this node.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when it is open on another
    /// node, and those of the store.
    pub fn set_durability(&self, durability: Durability) -> Result<()> {
        let command = Command::SetDurability { durability: durability.name().to_owned() };
        match self.ask_open(&command)? {
            true => Ok(()),
            false => block_on(life::set_durability(&self.requests(), durability)).map(drop),
        }
    }

    /// Describes it; it may be open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, and those of the store.
    pub fn describe(&self) -> Result<Info> {
        block_on(life::info(&self.requests(), self.wrapping_key()?.as_ref()))
    }

    /// Verifies what is stored of it, with its key; it may be open.
    ///
    /// # Errors
    /// As for [`check`](crate::check::check), and when its key cannot be read.
    pub fn check(&self, options: check::Options<'_>) -> Result<check::Report> {
        let key = self.wrapping_key()?;
        block_on(check::check(&self.requests(), &check::Options { key, ..options }))
    }

    /// Its newest root, if there is a volume.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when that is damaged, and those of the store.
    pub fn root(&self) -> Result<Option<Root>> {
        let newest = block_on(find_any(&self.requests()))?;
        Ok(newest.filter(|root| root.state != State::Deleted))
    }

    /// The last parts of the places beside its own that may have volumes, in order. There may be
    /// more than `max`, which are left out.
    ///
    /// # Errors
    /// Those of the store.
    pub fn siblings(&self, max: usize) -> Result<Vec<String>> {
        let answer = block_on(self.store.siblings(max));
        answer.map_err(|error| Error::new(ErrorKind::Io, "list", format!("{}: {error}", self.name)))
    }

    /// Its size in bytes; it may be open.
    ///
    /// # Errors
    /// As for [`Self::describe`].
    pub fn size(&self) -> Result<u64> {
        let requests = self.requests();
        match &self.snapshot {
            None => block_on(find(&requests)).map(|root| root.size_bytes()),
            Some(name) => block_on(find_snapshot((&requests, self.wrapping_key()?.as_ref()), name))
                .map(|(_, found)| found.size * BLOCK_BYTES),
        }
    }

    /// What tells it from all other volumes.
    ///
    /// # Errors
    /// As for [`StoredVolume::describe`].
    pub fn identity(&self) -> Result<String> {
        let requests = self.requests();
        match &self.snapshot {
            None => block_on(find(&requests)).map(|root| root.volume.to_string()),
            Some(name) => {
                let (root, found) =
                    block_on(find_snapshot((&requests, self.wrapping_key()?.as_ref()), name))?;
                Ok(snapshot_identity(root.volume, &found))
            }
        }
    }

    /// Makes it longer, and returns its size in bytes. What is new reads as zeroes. It may be open
    /// on this node: see [`Volume::grow`](sheave_core::Volume::grow).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Invalid`] when it is longer or
    /// cannot have this size, [`ErrorKind::Busy`] when it is open on another node, and those of the
    /// store.
    pub fn resize(&self, size_bytes: u64) -> Result<u64> {
        let requests = self.requests();
        let size = blocks_of(&requests, size_bytes)?;
        match self.ask_open(&Command::Resize { blocks: size })? {
            true => Ok(size_bytes),
            false => block_on(life::resize(&requests, size)).map(|root| root.size_bytes()),
        }
    }

    /// Deletes it, with the journal that this node has for it. A small object stays in the store,
    /// by which programs that have it open learn that it is gone.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when it is open and that use
    /// is not to be ended (`take_over`), and those of the store.
    pub fn delete(&self, take_over: bool) -> Result<()> {
        let author = (incarnation()?, node());
        if let Some(name) = &self.snapshot {
            return self.delete_snapshot(name, (author.0, &author.1));
        }
        self.store.sweep()?;
        let journal = self.identity().ok().map(|id| self.journals.join(id));
        block_on(life::delete(&self.requests(), (author.0, &author.1), take_over))?;
        let Some(journal) = journal.filter(|journal| journal.exists()) else { return Ok(()) };
        // It is locked by a process here that had the volume, which learns that it is deleted.
        let removed =
            JournalDir::open(&journal, JournalSize::default()).and_then(|dir| dir.remove());
        if let Err(error) = removed {
            tracing::warn!("{}: its journal on this node stays: {error}", self.name);
        }
        Ok(())
    }

    /// Makes the snapshot of that name, of all that was written. The volume may be open on this
    /// node.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when there is one, [`ErrorKind::Busy`] when the volume is open on
    /// another node, and those of the store.
    pub fn make_snapshot(&self) -> Result<()> {
        let (requests, name) = (self.requests(), self.snapshot_name("snapshot")?);
        let root = block_on(find(&requests))?;
        let command = Command::Snapshot { name: name.to_owned() };
        if self.ask(root.volume, &command)?.is_some() {
            return Ok(());
        }
        let (name, at_ms, key) = (name.to_owned(), door::now_ms(), self.wrapping_key()?);
        let change: Change = Arc::new(move |head| head.add(&name, at_ms).map(drop));
        match block_on(snapshots::change_closed((&requests, key.as_ref()), root, &change))? {
            true => Ok(()),
            false => self.ask_opened(&command).map(drop),
        }
    }

    fn delete_snapshot(&self, name: &str, author: (Incarnation, &str)) -> Result<()> {
        let requests = self.requests();
        let root = block_on(find(&requests))?;
        let command = Command::DeleteSnapshot { name: name.to_owned() };
        if self.ask(root.volume, &command)?.is_some() {
            return Ok(());
        }
        if root.state != State::Closed {
            return self.ask_opened(&command).map(drop);
        }
        let key = self.wrapping_key()?;
        let roots = ClosedRoots { requests: &requests, key: key.as_ref() };
        block_on(snapshots::delete(&requests, name, author, &roots))
    }

    /// Brings the volume back to the snapshot that is meant. What was written since is lost, unless
    /// another snapshot has it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such snapshot, [`ErrorKind::Busy`] when the volume
    /// is not closed, and those of the store.
    pub fn restore(&self) -> Result<()> {
        let (requests, name) = (self.requests(), self.snapshot_name("restore")?);
        self.check_store(&requests, true)?;
        let (node, incarnation, key) = (node(), incarnation()?, self.wrapping_key()?);
        let request = Request { node, incarnation, take_over: false, key };
        block_on(restore(&requests, &request, name))
    }

    /// Makes a clone of the snapshot that is meant, beside the volume, of that size or that of the
    /// snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such snapshot, [`ErrorKind::Exists`] when there is
    /// a volume, [`ErrorKind::Invalid`] for a size that cannot be or a place that is not beside the
    /// volume, and those of the store.
    pub fn make_clone(&self, clone: &Self, size_bytes: Option<u64>) -> Result<()> {
        let (requests, snapshot) = (self.requests(), self.snapshot_name("clone")?);
        let target = clone.requests();
        let invalid = |why: &str| Err(target.error(ErrorKind::Invalid, "clone", "", why));
        if clone.snapshot.is_some() || size_bytes.is_some_and(|size| size % BLOCK_BYTES != 0) {
            return invalid("a clone is a volume, whose size is a multiple of 4096 bytes");
        }
        // So that nothing is made for what does not exist.
        let key = self.wrapping_key()?;
        block_on(find_snapshot((&requests, key.as_ref()), snapshot))?;
        clone.store.make()?;
        let (Some((place, parent)), Some((beside, name))) = (self.store.home(), clone.store.home())
        else {
            return invalid("the names of a volume with clones, and theirs, must be UTF-8");
        };
        if place != beside {
            return invalid("a clone is made beside its volume, in the same directory or prefix");
        }
        let new = NewClone {
            volume: VolumeId(Uuid::now_v7().into_bytes()),
            incarnation: incarnation()?,
            node: node(),
            size: size_bytes.map(|size| size / BLOCK_BYTES),
            name,
            parent,
        };
        block_on(clones::clone((&requests, &target), (snapshot, key.as_ref()), &new))
    }

    /// Asks the process of this node that has the volume open for something. `None` if there is
    /// none.
    fn ask(&self, volume: VolumeId, command: &Command) -> Result<Option<Value>> {
        door::call(&self.journals.join(volume.to_string()), command)
    }

    /// The same, of a volume that exists. False if no process of this node has it open.
    fn ask_open(&self, command: &Command) -> Result<bool> {
        let root = block_on(find(&self.requests()))?;
        self.ask(root.volume, command).map(|answer| answer.is_some())
    }

    /// Opens the volume, which nothing here has open, asks for something, and closes it.
    fn ask_opened(&self, command: &Command) -> Result<Value> {
        let volume = Self { snapshot: None, ..self.clone() }.open(false)?;
        let outcome = volume.ask(command);
        drop(volume);
        finish_closing(CLOSING_TIMEOUT);
        outcome
    }

    /// The name of the snapshot that is meant.
    fn snapshot_name(&self, op: &'static str) -> Result<&str> {
        let why = "name the snapshot too, VOLUME@NAME";
        let missing = || self.requests().error(ErrorKind::Invalid, op, "", why);
        self.snapshot.as_deref().ok_or_else(missing)
    }

    /// Opens it. It can be open once, also for reading.
    ///
    /// # Errors
    /// As for [`open`](crate::open::open), and those of the journal.
    pub fn open(&self, take_over: bool) -> Result<ObjectVolume> {
        self.open_tuned(take_over, Tuning::default())
    }

    /// As [`StoredVolume::open`], with another use of this node.
    ///
    /// # Errors
    /// As there.
    pub fn open_tuned(&self, take_over: bool, tuning: Tuning) -> Result<ObjectVolume> {
        let requests = self.requests();
        self.check_store(&requests, true)?;
        self.store.sweep()?;
        let key = self.wrapping_key()?;
        let request = Request { node: node(), incarnation: incarnation()?, take_over, key };
        ObjectVolume::open(&self.name, &requests, &request, &self.journals, tuning)
    }

    /// Opens its snapshot, which is only read. Any number of nodes can have it open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Corrupt`] when its objects are
    /// damaged, and those of the store.
    pub fn open_snapshot(&self, tuning: Tuning) -> Result<ObjectVolume> {
        let (requests, name) = (self.requests(), self.snapshot_name("open")?);
        let key = self.wrapping_key()?;
        let access = (&requests, key.as_ref());
        ObjectVolume::open_snapshot(&self.name, access, name, &self.journals, tuning)
    }

    /// Probes the store, unless this node has done so recently. That another node has done it is
    /// not enough: what says so would be copied with the bucket to a store that was never probed.
    /// Nothing is made for a volume that must exist and does not.
    fn check_store(&self, requests: &Requests, must_exist: bool) -> Result<()> {
        let store = match self.store.fencing() {
            Fencing::Sure => return Ok(()),
            Fencing::None => {
                tracing::warn!(
                    "{}: without fencing; if another process opens it at the same time, both \
                     destroy data",
                    self.name
                );
                return Ok(());
            }
            Fencing::Probed(store) => store,
        };
        let passed = Passed::of(&self.journals, &store);
        if passed.is_recent() {
            return Ok(());
        }
        if must_exist {
            self.identity()?;
        }
        block_on(probe::race(requests, incarnation()?))?;
        let noted = make_journals(&self.journals).and_then(|()| passed.note());
        if let Err(error) = noted {
            tracing::warn!("the store is probed again next time: {error}");
        }
        Ok(())
    }

    /// The key of its keys, if it has one.
    fn wrapping_key(&self) -> Result<Option<WrappingKey>> {
        self.key.as_ref().map(KeySource::read).transpose()
    }

    fn requests(&self) -> Requests {
        Requests::new(Arc::clone(&self.store) as _, Arc::new(SystemClock), &self.name)
    }
}

/// The blocks of a size that a volume can have.
pub(crate) fn blocks_of(requests: &Requests, size_bytes: u64) -> Result<Blocks> {
    if !size_bytes.is_multiple_of(BLOCK_BYTES) {
        let why = format!("a size of {size_bytes} bytes is not a multiple of {BLOCK_BYTES}");
        return Err(requests.error(ErrorKind::Invalid, "size", "", &why));
    }
    life::check_size(requests, size_bytes / BLOCK_BYTES)?;
    Ok(size_bytes / BLOCK_BYTES)
}

/// Makes the directory of journals, which others have no business in.
pub(crate) fn make_journals(dir: &Path) -> Result<()> {
    let failed = |error| Error::from_io("make", printable(dir).to_string(), error);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)
}

/// Random bytes that no other opening has.
pub(crate) fn incarnation() -> Result<Incarnation> {
    salts().map(|mut random| Incarnation(random()))
}

/// The name of this node, for messages on others.
pub(crate) fn node() -> String {
    let mut name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    while name.len() > NODE_BYTES_MAX {
        name.pop();
    }
    name
}
