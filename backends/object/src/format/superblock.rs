//! The superblock of a journal: whose journal it is (docs/format.md, "Superblock").

use std::path::Path;

use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, printable};
use uuid::Uuid;

use crate::ids::{Epoch, Incarnation, Opening, VolumeId};

const VERSION: u32 = 1;

/// Which volume a journal belongs to, and which openings of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The volume.
    pub volume: VolumeId,
    /// The last opening of which the journal knows that its root says "open".
    pub current: Option<Opening>,
    /// An opening that was about to make such a root.
    pub adopting: Option<Opening>,
}

/// As the file has it.
#[derive(Serialize, Deserialize)]
pub(super) struct Stored {
    version: u32,
    volume: Uuid,
    current: Option<StoredOpening>,
    adopting: Option<StoredOpening>,
}

#[derive(Serialize, Deserialize)]
struct StoredOpening {
    epoch: u64,
    incarnation: Uuid,
}

impl Superblock {
    /// Reads it; `None` if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is damaged, [`ErrorKind::Unsupported`] when a newer program
    /// has written it, and errors of the file system.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>> {
        sheave_durable::read(path)?.map(|stored| Self::of_stored(path, stored)).transpose()
    }

    /// The value of the file at `path`.
    pub(super) fn of_stored(path: &Path, stored: Stored) -> Result<Self> {
        if stored.version != VERSION {
            let why = format!(
                "{}: its version is {}, this program knows {VERSION}; use a newer program",
                printable(path),
                stored.version
            );
            return Err(Error::new(ErrorKind::Unsupported, "open", why));
        }
        let opening = |stored: StoredOpening| Opening {
            epoch: Epoch(stored.epoch),
            incarnation: Incarnation(stored.incarnation.into_bytes()),
        };
        Ok(Self {
            volume: VolumeId(stored.volume.into_bytes()),
            current: stored.current.map(opening),
            adopting: stored.adopting.map(opening),
        })
    }

    /// Puts it in place of the old one, on stable storage.
    ///
    /// # Errors
    /// Errors of the file system; the old or the new one is there then.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        sheave_durable::replace(path, &self.to_stored())
    }

    pub(super) fn to_stored(self) -> Stored {
        let opening = |opening: Opening| StoredOpening {
            epoch: opening.epoch.0,
            incarnation: Uuid::from_bytes(opening.incarnation.0),
        };
        Stored {
            version: VERSION,
            volume: Uuid::from_bytes(self.volume.0),
            current: self.current.map(opening),
            adopting: self.adopting.map(opening),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_written_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("superblock");
        assert_eq!(Superblock::read(&path).unwrap(), None);
        let opening =
            |epoch| Opening { epoch: Epoch(epoch), incarnation: Incarnation([epoch as u8; 16]) };
        let volume = VolumeId([3; 16]);
        let written = Superblock { volume, current: Some(opening(7)), adopting: Some(opening(8)) };
        written.write(&path).unwrap();
        assert_eq!(Superblock::read(&path).unwrap(), Some(written));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"epoch\":7", "\"epoch\":6")).unwrap();
        assert_eq!(Superblock::read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
