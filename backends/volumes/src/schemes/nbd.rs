//! `nbd://host/export` and its kin: an export of an NBD server.

use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result, Volume};
use sheave_exec::Program;
use sheave_proto::uri::NbdUri;

use crate::names::absolute_paths;
use crate::parse::{Parameters, invalid};
use crate::source::{Scheme, Source, Url};

pub(crate) const SCHEME: Scheme =
    Scheme { names: &["nbd", "nbds", "nbd+unix", "nbds+unix"], starts_program: false, parse };

/// The parameters of an NBD URI ("uri.md" of the NBD project), and those that libnbd adds.
const URI_PARAMETERS: [&str; 6] =
    ["socket", "tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-psk-file"];
/// Those of them that are paths.
const PATHS: [&str; 3] = ["socket", "tls-certificates", "tls-psk-file"];

#[derive(Clone, Debug)]
struct Remote {
    uri: NbdUri,
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
    Ok(Arc::new(Remote { uri }))
}

/// Opens an export. `program` is the server, if it runs for this volume only.
pub(super) fn open(
    uri: &NbdUri,
    name: &str,
    _read_only: bool,
    program: Option<Program>,
) -> Result<Arc<dyn Volume>> {
    drop(program);
    let why = "a remote export can only be copied from and to in this version";
    let _ = uri;
    Err(Error::new(ErrorKind::Unsupported, "open", format!("{name}: {why}")))
}

impl Source for Remote {
    fn open(&self, read_only: bool) -> Result<Arc<dyn Volume>> {
        open(&self.uri, &self.uri.to_string(), read_only, None)
    }

    fn name(&self) -> String {
        match self.uri.export.as_str() {
            "" => "nbd".to_owned(),
            export => export.to_owned(),
        }
    }

    fn place(&self) -> Option<String> {
        Some(format!("{:?} of {:?}", self.uri.export, self.uri.transport))
    }

    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        Ok(location.to_owned() + &absolute_paths(query, &PATHS)?)
    }
}
