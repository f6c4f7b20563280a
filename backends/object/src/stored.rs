//! Volumes by the stores that they are in.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result, printable};
use uuid::Uuid;

use crate::clock::SystemClock;
use crate::format::{Codec, NODE_BYTES_MAX};
use crate::ids::{BLOCK_BYTES, Incarnation, VolumeId};
use crate::journal::{JournalDir, JournalSize};
use crate::key_source::KeySource;
use crate::life::{self, Info, NewVolume};
use crate::open::{Request, find};
use crate::passed::Passed;
use crate::probe;
use crate::retry::Requests;
use crate::store::Store;
use crate::threads::block_on;
use crate::volume::{ObjectVolume, Tuning};
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
}

impl StoredVolume {
    /// Makes it, encrypted if it has a key. A size is whole blocks of 4 KiB.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when there is one, [`ErrorKind::Invalid`] for a size that cannot be,
    /// and those of the store.
    pub fn create(&self, size_bytes: u64, codec: Codec) -> Result<()> {
        let requests = self.requests();
        let key = self.key.as_ref().map(KeySource::read).transpose()?;
        if !size_bytes.is_multiple_of(BLOCK_BYTES) {
            let why = format!("a size of {size_bytes} bytes is not a multiple of {BLOCK_BYTES}");
            return Err(requests.error(ErrorKind::Invalid, "create", "", &why));
        }
        // Before anything is made.
        life::check_size(&requests, size_bytes / BLOCK_BYTES)?;
        self.store.make()?;
        self.check_store(&requests, false)?;
        let new = NewVolume {
            volume: VolumeId(Uuid::now_v7().into_bytes()),
            incarnation: incarnation()?,
            node: node(),
            size: size_bytes / BLOCK_BYTES,
            codec,
            key,
        };
        block_on(life::create(&requests, &new)).map(drop)
    }

    /// Describes it; it may be open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, and those of the store.
    pub fn describe(&self) -> Result<Info> {
        block_on(life::info(&self.requests()))
    }

    /// Its size in bytes; it may be open.
    ///
    /// # Errors
    /// As for [`Self::describe`].
    pub fn size(&self) -> Result<u64> {
        block_on(find(&self.requests())).map(|root| root.size_bytes())
    }

    /// What tells it from all other volumes.
    ///
    /// # Errors
    /// As for [`StoredVolume::describe`].
    pub fn identity(&self) -> Result<VolumeId> {
        block_on(find(&self.requests())).map(|root| root.volume)
    }

    /// Deletes it, with the journal that this node has for it. A small object stays in the store,
    /// by which programs that have it open learn that it is gone.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, [`ErrorKind::Busy`] when it is open and that use
    /// is not to be ended (`take_over`), and those of the store.
    pub fn delete(&self, take_over: bool) -> Result<()> {
        let author = (incarnation()?, node());
        self.store.sweep()?;
        let journal = self.identity().ok().map(|id| self.journals.join(id.to_string()));
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
        let key = self.key.as_ref().map(KeySource::read).transpose()?;
        let request = Request { node: node(), incarnation: incarnation()?, take_over, key };
        ObjectVolume::open(&self.name, &requests, &request, &self.journals, tuning)
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

    fn requests(&self) -> Requests {
        Requests::new(Arc::clone(&self.store) as _, Arc::new(SystemClock), &self.name)
    }
}

/// Makes the directory of journals, which others have no business in.
pub(crate) fn make_journals(dir: &Path) -> Result<()> {
    let failed = |error| Error::from_io("make", printable(dir).to_string(), error);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)
}

/// Random bytes that no other opening has.
fn incarnation() -> Result<Incarnation> {
    salts().map(|mut random| Incarnation(random()))
}

/// The name of this node, for messages on others.
fn node() -> String {
    let mut name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    while name.len() > NODE_BYTES_MAX {
        name.pop();
    }
    name
}
