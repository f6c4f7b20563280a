//! The daemon that writes to a volume of a pool that nodes share.
//!
//! The record names the last one. Another daemon takes its place only while it holds the lock of
//! the image, so the last one has ended, or its node has lost the lock and with it the ability to
//! write. A daemon that comes back, and finds another one in the record, does not serve what it
//! had: its kernel may hold data that is older than that of the image.

use rustix::system::uname;
use sheave_core::{Error, ErrorKind, Result, printable};
use uuid::Uuid;

use super::FilePool;
use crate::record::{Record, Writer};

impl FilePool {
    /// Makes this daemon the writer, see [`crate::Pool::begin_writing`].
    pub(super) fn become_writer(&self, uuid: Uuid) -> Result<()> {
        let locked = self.lock()?;
        let record = self.existing(uuid)?;
        let own = self.own_id()?;
        if record.writer.as_ref().is_some_and(|writer| writer.daemon == own) {
            return self.settle(uuid);
        }
        let _alone =
            self.open_alone(uuid).map_err(|error| match (error.kind(), &record.writer) {
                (ErrorKind::Busy, Some(writer)) => {
                    let why = format!(
                        "{} is in use on node {}; end that use first: {error}",
                        record.name,
                        printable(&writer.host)
                    );
                    Error::new(ErrorKind::Busy, "attach", why)
                }
                _ => error,
            })?;
        let host = uname().nodename().to_string_lossy().into_owned();
        let record = Record { writer: Some(Writer { daemon: own, host }), ..record };
        self.save(&locked, &record)
    }

    /// Checks that this daemon is the writer, see [`crate::Pool::check_writer`].
    pub(super) fn is_writer(&self, uuid: Uuid) -> Result<()> {
        self.check()?;
        let record = self.existing(uuid)?;
        let own = self.own_id()?;
        let by = match &record.writer {
            Some(writer) if writer.daemon == own => return Ok(()),
            Some(writer) => format!("node {} has used it since", printable(&writer.host)),
            None => "its publication has ended since".to_owned(),
        };
        let why = format!(
            "{}: {by}, so what this node has not written yet is out of date; detach it by force, \
             which drops that",
            record.name
        );
        Err(Error::new(ErrorKind::Fenced, "serve", why))
    }

    fn own_id(&self) -> Result<Uuid> {
        self.identified.daemon()?.ok_or_else(|| {
            let why = format!(
                "pool {}: its volumes are attached by a daemon, which has a state directory",
                self.info.name
            );
            Error::new(ErrorKind::Unsupported, "attach", why)
        })
    }
}
