//! Exports and their clients, as a serving process reports them.

use serde::{Deserialize, Serialize};
use sheave_nbd::{ClientSnapshot, ExportSnapshot};

/// One export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExportEntry {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) size_bytes: u64,
    pub(crate) read_only: bool,
    /// The most connections at a time.
    pub(crate) connections_max: Option<usize>,
    /// The oldest first.
    pub(crate) clients: Vec<ClientEntry>,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClientEntry {
    /// Address and port, or process and user at a unix socket.
    pub(crate) peer: String,
    /// The first name in its certificate.
    pub(crate) certificate: Option<String>,
    /// How long it has been connected.
    pub(crate) connected_ms: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
}

impl From<ExportSnapshot> for ExportEntry {
    fn from(export: ExportSnapshot) -> Self {
        let ExportSnapshot { name, description, size, read_only, connections_max, clients } =
            export;
        let clients = clients.into_iter().map(ClientEntry::from).collect();
        Self { name, description, size_bytes: size, read_only, connections_max, clients }
    }
}

impl From<ClientSnapshot> for ClientEntry {
    fn from(client: ClientSnapshot) -> Self {
        let ClientSnapshot { peer, certificate, connected, bytes_read, bytes_written } = client;
        let connected_ms = connected.as_millis().try_into().unwrap_or(u64::MAX);
        Self { peer, certificate, connected_ms, bytes_read, bytes_written }
    }
}
