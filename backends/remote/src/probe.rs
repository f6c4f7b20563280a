//! What a server offers, found out by asking it.

use std::io;
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind, printable};
use sheave_proto::uri::NbdUri;
use sheave_proto::wire::reply_type;
use sheave_proto::{ClientConfig, ClientError, ClientNegotiated, ExportEntry, Goal};
use sheave_tls::client_tls;

use crate::reach::{Reached, Refused, reach};

/// A server that has not answered by then is taken for dead.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// The most names in a message.
const NAMES_MAX: usize = 10;

/// What a server offers.
#[derive(Debug)]
pub struct Offered {
    /// The version of TLS and the cipher suite, if the connection was encrypted.
    pub tls: Option<String>,
    /// Whether the server would encrypt a connection.
    pub starts_tls: bool,
    /// Its exports, or why it does not name them.
    pub exports: Result<Vec<ExportEntry>, String>,
    /// The export that was asked for, with all its metadata contexts.
    pub export: ClientNegotiated,
}

/// Asks the server that an NBD URI names, on connections of their own. Messages call it `name`.
///
/// # Errors
/// When nothing answers there, it is no NBD server, TLS fails, or it has no such export. The error
/// then names those that it has.
pub fn probe(uri: &NbdUri, name: &str) -> Result<Offered, Error> {
    let tls = if uri.tls { Some(client_tls(uri)?) } else { None };
    let ask = |goal, encrypt| {
        let config = ClientConfig {
            export: uri.export.clone(),
            goal,
            // All there are.
            contexts: Vec::new(),
            tls: encrypt,
            ..ClientConfig::default()
        };
        reach(&uri.transport, config, tls.as_ref(), Instant::now() + ANSWER_MAX)
    };
    let exports = || match ask(Goal::List, uri.tls) {
        Ok(Reached::Listed(exports)) => Ok(exports),
        Ok(_) => Err("it answers something else".to_owned()),
        Err(refused) => Err(refused.to_string()),
    };
    match ask(Goal::Info, uri.tls) {
        Ok(Reached::Negotiated { stream, negotiated, .. }) => {
            let tls = stream.tls();
            let starts_tls = tls.is_some() || matches!(ask(Goal::Info, true), Ok(Reached::Tls));
            Ok(Offered { tls, starts_tls, exports: exports(), export: *negotiated })
        }
        Ok(_) => {
            let why = format!("{name}: the server answers something else");
            Err(Error::new(ErrorKind::Io, "connect", why))
        }
        Err(refused) => {
            let is_export = matches!(&refused, Refused::Server(ClientError::Refused { .. }));
            let error = refused.at(name);
            match is_export.then(exports) {
                Some(Ok(exports)) => Err(error.because(io::Error::other(has(&exports)))),
                _ => Err(error),
            }
        }
    }
}

/// The names of a server's exports.
///
/// # Errors
/// [`ErrorKind::Io`] when it does not answer within this time, or does not name them.
pub fn list(uri: &NbdUri, name: &str, within: Duration) -> Result<Vec<String>, Error> {
    match ask_one(uri, "", Goal::List, within).map_err(|refused| away(&refused, name))? {
        Reached::Listed(exports) => Ok(exports.into_iter().map(|export| export.name).collect()),
        _ => Err(Error::new(ErrorKind::Io, "list", format!("{name}: it answers something else"))),
    }
}

/// The bytes of a server's export.
///
/// # Errors
/// [`ErrorKind::NotFound`] when it has no such export, [`ErrorKind::Io`] when it does not answer
/// within this time.
pub fn export_size(uri: &NbdUri, name: &str, export: &str, within: Duration) -> Result<u64, Error> {
    match ask_one(uri, export, Goal::Info, within) {
        Ok(Reached::Negotiated { negotiated, .. }) => Ok(negotiated.size),
        Ok(_) => {
            Err(Error::new(ErrorKind::Io, "find", format!("{name}: it answers something else")))
        }
        Err(Refused::Server(ClientError::Refused { code: reply_type::ERR_UNKNOWN, .. })) => {
            let why = format!("{name} has no export {}", printable(export));
            Err(Error::new(ErrorKind::NotFound, "find", why))
        }
        Err(refused) => Err(away(&refused, name)),
    }
}

fn ask_one(uri: &NbdUri, export: &str, goal: Goal, within: Duration) -> Result<Reached, Refused> {
    let tls = uri.tls.then(|| client_tls(uri)).transpose();
    let tls = tls.map_err(|error| Refused::Io(io::Error::other(error)))?;
    let config = ClientConfig {
        export: export.to_owned(),
        goal,
        contexts: Vec::new(),
        tls: uri.tls,
        ..ClientConfig::default()
    };
    reach(&uri.transport, config, tls.as_ref(), Instant::now() + within)
}

/// Nothing is known of what the server has.
fn away(refused: &Refused, name: &str) -> Error {
    Error::new(ErrorKind::Io, "connect", format!("{name}: {refused}"))
}

/// Which exports there are, for a message.
fn has(exports: &[ExportEntry]) -> String {
    let names = exports.iter().take(NAMES_MAX);
    let names = names.map(|export| format!("\"{}\"", printable(&export.name)));
    let names = names.collect::<Vec<_>>().join(", ");
    match exports.len() {
        0 => "it names no export".to_owned(),
        count if count > NAMES_MAX => format!("it has {names} and {} more", count - NAMES_MAX),
        _ => format!("it has {names}"),
    }
}
