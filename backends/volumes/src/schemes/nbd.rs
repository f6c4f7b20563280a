//! `nbd://host/export` and its kin: an export of an NBD server.

use std::sync::Arc;
use std::time::Duration;

use sheave_core::{Error, Result, Volume, parse_count, parse_duration_ns};
use sheave_exec::Program;
use sheave_proto::uri::NbdUri;
use sheave_remote::{CONNECTIONS_MAX, RemoteOptions, RemoteVolume};

use crate::names::absolute_paths;
use crate::parse::{Parameters, invalid};
use crate::source::{Scheme, Source, Url};
use crate::spec::OpenOptions;

pub(crate) const SCHEME: Scheme =
    Scheme { names: &["nbd", "nbds", "nbd+unix", "nbds+unix"], starts_program: false, parse };

/// The parameters of an NBD URI ("uri.md" of the NBD project), and those that libnbd adds.
const URI_PARAMETERS: [&str; 6] =
    ["socket", "tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-psk-file"];
/// Those of them that are paths.
const PATHS: [&str; 3] = ["socket", "tls-certificates", "tls-psk-file"];

#[derive(Clone, Debug)]
struct Remote {
    options: RemoteOptions,
}

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    let mut query = String::new();
    for name in URI_PARAMETERS {
        for value in parameters.take_raw(name) {
            query += &format!("{}{name}={value}", if query.is_empty() { "?" } else { "&" });
        }
    }
    let uri: NbdUri = format!("{}{query}", url.location)
        .parse()
        .map_err(|error| invalid("parse volume", url.text.to_owned()).because(error))?;
    Ok(Arc::new(Remote { options: options(uri, parameters)? }))
}

/// Options for using an export, from the parameters of its VOLUME.
pub(super) fn options(uri: NbdUri, parameters: &mut Parameters) -> Result<RemoteOptions> {
    let mut options = RemoteOptions::new(uri);
    if let Some(text) = parameters.take("connections")? {
        let count = usize::try_from(parse_count("connections", &text)?).ok();
        let count = count.filter(|count| *count <= CONNECTIONS_MAX);
        options.connections = Some(count.ok_or_else(|| {
            parameters.wrong(&format!("connections={text}: the most is {CONNECTIONS_MAX}"))
        })?);
    }
    if let Some(timeout) = duration("connect-timeout", parameters)? {
        options.connect_timeout = timeout;
    }
    options.reconnect_timeout = duration("reconnect-timeout", parameters)?;
    if let Some(timeout) = duration("request-timeout", parameters)? {
        options.request_timeout = timeout;
    }
    if let Some(bytes) = parameters.take_bytes("replay-bytes")? {
        options.replay_bytes = bytes;
    }
    Ok(options)
}

/// The options of a text with those of an opener.
pub(super) fn opened_with(text: &RemoteOptions, opener: &OpenOptions) -> RemoteOptions {
    RemoteOptions {
        read_only: opener.read_only,
        connections: text.connections.or(opener.connections),
        reconnect_timeout: text.reconnect_timeout.or(opener.away_max),
        ..text.clone()
    }
}

/// A time in seconds, or with a unit.
fn duration(name: &'static str, parameters: &mut Parameters) -> Result<Option<Duration>> {
    let Some(text) = parameters.take(name)? else { return Ok(None) };
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let nanos = parse_duration_ns(&if is_plain { format!("{text}s") } else { text.clone() });
    match nanos {
        Some(nanos @ 1..) => Ok(Some(Duration::from_nanos(nanos))),
        _ => Err(parameters.wrong(&format!("{name}={text}: write seconds, or 500ms; not 0"))),
    }
}

/// An NBD server and its address. A program that was started for it runs until this is dropped.
#[derive(Debug)]
pub struct NbdServer {
    /// The URI of the export. The path of a started program's socket is valid in this process only.
    pub uri: NbdUri,
    /// Its name in messages.
    pub name: String,
    pub(super) program: Option<Arc<Program>>,
}

impl NbdServer {
    /// The names of its exports.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](sheave_core::ErrorKind::Io) when it does not answer within this time.
    pub fn exports(&self, within: Duration) -> Result<Vec<String>> {
        sheave_remote::list(&self.uri, &self.name, within)
    }

    /// The bytes of one of its exports.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](sheave_core::ErrorKind::NotFound) when it has no such export, and as
    /// for [`Self::exports`].
    pub fn export_size(&self, export: &str, within: Duration) -> Result<u64> {
        sheave_remote::export_size(&self.uri, &self.name, export, within)
    }

    /// The error of a connection that could not be opened, with the last line of its program, if
    /// that has ended.
    #[must_use]
    pub fn explain(&self, error: Error) -> Error {
        match self.program.as_ref().and_then(|program| program.last_words()) {
            Some(words) => {
                let why = format!("{}: the program ended: {words}", self.name);
                Error::new(error.kind(), "connect", why)
            }
            None => error,
        }
    }
}

impl Source for Remote {
    fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        Ok(Arc::new(RemoteVolume::open(opened_with(&self.options, options))?))
    }

    fn server(&self) -> Option<Result<NbdServer>> {
        let (uri, name) = (self.options.uri.clone(), self.options.name.clone());
        Some(Ok(NbdServer { uri, name, program: None }))
    }

    fn name(&self) -> String {
        match self.options.uri.export.as_str() {
            "" => "nbd".to_owned(),
            export => export.to_owned(),
        }
    }

    fn place(&self) -> Option<String> {
        Some(format!("{:?} of {:?}", self.options.uri.export, self.options.uri.transport))
    }

    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        Ok(location.to_owned() + &absolute_paths(query, &PATHS)?)
    }
}
