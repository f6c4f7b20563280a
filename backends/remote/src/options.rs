//! How a remote volume is reached, and what it does without its server.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use sheave_proto::uri::NbdUri;

/// The most connections to one export.
pub const CONNECTIONS_MAX: usize = 16;

/// How to reach an export, and what to do while it cannot be reached.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// The export.
    pub uri: NbdUri,
    /// What messages call it.
    pub name: String,
    /// Lives as long as the volume and its connections do, such as a program that is the server.
    pub server: Option<Arc<dyn Any + Send + Sync>>,
    /// Send nothing that changes the export.
    pub read_only: bool,
    /// Connections to use if the server allows several, 1 to [`CONNECTIONS_MAX`]; `None` is 1.
    pub connections: Option<usize>,
    /// How long one attempt to connect may take.
    pub connect_timeout: Duration,
    /// How long ops wait for a server that is away before they fail; `None` is for ever.
    pub reconnect_timeout: Option<Duration>,
    /// A server that owes answers and sends nothing for so long is given up, and asked again over
    /// a new connection.
    pub request_timeout: Duration,
    /// The longest pause between two attempts to connect.
    pub pause_max: Duration,
    /// Bytes of writes that are kept until a flush covers them. Before there are more, the volume
    /// flushes by itself. With 0 nothing is kept: a connection that ends loses what was not
    /// flushed.
    pub replay_bytes: u64,
}

impl RemoteOptions {
    /// The defaults.
    #[must_use]
    pub fn new(uri: NbdUri) -> Self {
        Self {
            name: uri.to_string(),
            uri,
            server: None,
            read_only: false,
            connections: None,
            connect_timeout: Duration::from_secs(10),
            reconnect_timeout: None,
            request_timeout: Duration::from_secs(60),
            pause_max: Duration::from_secs(2),
            replay_bytes: 64 << 20,
        }
    }
}
