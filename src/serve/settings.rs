//! The settings of command line and configuration file. The command line has precedence.

use std::path::PathBuf;

use sheave_tls::TlsFiles;

use super::listeners::ListenAddresses;
use super::prepare::{Request, Wanted};
use crate::commands::serve::Args;
use crate::config::serve::{EngineArg, ServeConfig};
use crate::config::{BadConfig, POLL_US_DEFAULT};

/// The settings of a server.
pub(crate) struct Settings {
    pub(crate) fixed: Fixed,
    pub(crate) request: Request,
}

/// Settings that only a restart changes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fixed {
    pub(crate) addresses: ListenAddresses,
    pub(crate) shards: Option<u32>,
    pub(crate) poll_us: u32,
    pub(crate) engine: EngineArg,
    pub(crate) metrics: Option<String>,
}

impl Settings {
    /// Reads the file that the command line names.
    ///
    /// # Errors
    /// Names what cannot be read, or is inconsistent.
    pub(crate) fn read(args: &Args) -> Result<Self, BadConfig> {
        let file = args.config.as_deref().map(ServeConfig::load).transpose()?.unwrap_or_default();
        let tls = tls_files(args, &file)?;
        let mut exports = args.wanted();
        exports.extend(file.exports.into_iter().map(|export| Wanted {
            read_only: export.read_only || args.read_only,
            take_over: args.take_over,
            ..export
        }));
        let fixed = Fixed {
            addresses: ListenAddresses {
                listen: [args.listen.clone(), file.listen].concat(),
                sockets: [args.socket.clone(), file.sockets].concat(),
                socket_mode: args.socket_mode.or(file.socket_mode),
                socket_group: args.socket_group.clone().or(file.socket_group),
            },
            shards: args.shards.or(file.shards),
            poll_us: args.poll_us.or(file.poll_us).unwrap_or(POLL_US_DEFAULT),
            engine: args.engine.or(file.engine).unwrap_or(EngineArg::Auto),
            metrics: args.metrics.clone().or(file.metrics),
        };
        Ok(Self { fixed, request: Request { exports, tls } })
    }
}

impl Fixed {
    /// The keys in which `now` differs.
    pub(crate) fn changed(&self, now: &Self) -> Vec<&'static str> {
        let (old, new) = (&self.addresses, &now.addresses);
        let keys = [
            ("listen", old.listen != new.listen),
            ("socket", old.sockets != new.sockets),
            ("socket_mode", old.socket_mode != new.socket_mode),
            ("socket_group", old.socket_group != new.socket_group),
            ("shards", self.shards != now.shards),
            ("poll_us", self.poll_us != now.poll_us),
            ("engine", self.engine != now.engine),
            ("metrics", self.metrics != now.metrics),
        ];
        keys.into_iter().filter(|(_, is_changed)| *is_changed).map(|(key, _)| key).collect()
    }
}

/// # Errors
/// When a file is named without another that it needs.
fn tls_files(args: &Args, file: &ServeConfig) -> Result<Option<TlsFiles>, BadConfig> {
    let either =
        |one: &Option<PathBuf>, other: &Option<PathBuf>| one.clone().or_else(|| other.clone());
    let cert = either(&args.tls_cert, &file.tls_cert);
    let key = either(&args.tls_key, &file.tls_key);
    let client_ca = either(&args.tls_client_ca, &file.tls_client_ca);
    let client_crl = either(&args.tls_client_crl, &file.tls_client_crl);
    let lacks = |given, missing| {
        let (one, other) = (option(given), option(missing));
        Err(BadConfig::new(format!("{one} is given without {other}, which it needs")))
    };
    match (cert, key) {
        (Some(_), None) => lacks("tls_cert", "tls_key"),
        (None, Some(_)) => lacks("tls_key", "tls_cert"),
        (None, None) if client_ca.is_some() => lacks("tls_client_ca", "tls_cert"),
        _ if client_crl.is_some() && client_ca.is_none() => {
            lacks("tls_client_crl", "tls_client_ca")
        }
        (Some(cert), Some(key)) => Ok(Some(TlsFiles { cert, key, client_ca, client_crl })),
        (None, None) => Ok(None),
    }
}

/// How a key is written on the command line.
fn option(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}
