//! A volume on another NBD server, by blocking calls: for tools, not for shards.

use std::sync::{Arc, Mutex, PoisonError};

use sheave_core::{
    Backend, Completion, Error, ErrorKind, Io, IoDone, Op, Result, Submitted, Tag, Volume,
    VolumeInfo,
};
use sheave_proto::uri::NbdUri;
use sheave_tls::{ClientTls, client_tls};

use crate::client::{Connection, SILENCE_MAX};

/// An export of an NBD server. Every backend is a connection of its own.
pub struct Remote {
    uri: NbdUri,
    tls: Option<ClientTls>,
    /// As negotiated by the first connection.
    size: u64,
    info: VolumeInfo,
    /// The connection that told what the volume is, for the first backend.
    first: Mutex<Option<Connection>>,
}

impl Remote {
    /// Connects to the server that an NBD URI names.
    ///
    /// # Errors
    /// When it is no such URI, nobody answers, or the server has no such export.
    pub fn open(uri: &str) -> Result<Self> {
        let uri: NbdUri = uri
            .parse()
            .map_err(|error| Error::new(ErrorKind::Invalid, "connect", uri).because(error))?;
        if let Some(unknown) = uri.unknown_parameters().next() {
            let what = format!("{uri}: unknown parameter {unknown}");
            return Err(Error::new(ErrorKind::Invalid, "connect", what));
        }
        let tls = if uri.tls { Some(client_tls(&uri)?) } else { None };
        let first = Connection::open(&uri, tls.as_ref(), SILENCE_MAX)?;
        let (size, info) = (first.size(), first.info().clone());
        Ok(Self { uri, tls, size, info, first: Mutex::new(Some(first)) })
    }
}

impl Volume for Remote {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grow(&self) -> Result<u64> {
        // A connection keeps the size that it was negotiated with.
        Ok(self.size)
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let connection = match first {
            Some(connection) => connection,
            None => Connection::open(&self.uri, self.tls.as_ref(), SILENCE_MAX)?,
        };
        Ok(Box::new(RemoteBackend { info: self.info.clone(), connection }))
    }
}

struct RemoteBackend {
    info: VolumeInfo,
    connection: Connection,
}

impl Backend for RemoteBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, _: Tag, _: &mut dyn Io) -> Submitted {
        Submitted::Done(self.connection.run(&op))
    }

    fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {
        unreachable!("a blocking client starts no file I/O")
    }

    fn reap(&mut self, _: &mut dyn Io) -> Option<Completion> {
        None
    }
}
