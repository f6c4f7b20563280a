//! TLS of servers and clients: identities and authorities from files, with errors that explain
//! them, and connections to servers by NBD URI.
#![forbid(unsafe_code)]

mod connect;
mod der;
mod files;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ServerConfig, ServerConnection};
use sheave_core::{Error, ErrorKind};
use sheave_proto::uri::{NbdUri, TlsKind, Transport};
use webpki::EndEntityCert;

pub use self::connect::connect;
use self::files::{authorities, certificates, invalid, private_key, revocation_lists};

/// The files of a server's identity, in PEM or DER.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificate authorities of the clients; without it every client may connect.
    pub client_ca: Option<PathBuf>,
    /// Revocation lists of these authorities. With it, a client is let in only if its authority has
    /// a list that does not name its certificate; the date by which a list should be renewed is
    /// ignored.
    pub client_crl: Option<PathBuf>,
}

impl TlsFiles {
    /// All files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let Self { cert, key, client_ca, client_crl } = self;
        [Some(cert), Some(key), client_ca.as_ref(), client_crl.as_ref()]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
    }
}

/// A configuration for TLS 1.2 and 1.3 from files.
///
/// # Errors
/// Names the file that cannot be used, and why.
pub fn server_tls(files: &TlsFiles) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = certificates(&files.cert, "the server's certificate")?;
    let key = private_key(&files.key)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(no_versions)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = authorities(
                path,
                "what --tls-client-ca names: authorities of which clients must show a certificate",
            )?;
            let roots = Arc::new(roots);
            let lists = files.client_crl.as_deref().map(revocation_lists).transpose()?;
            let blamed = files.client_crl.as_ref().unwrap_or(path);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .with_crls(lists.unwrap_or_default())
                .build()
                .map_err(|error| invalid(blamed, "cannot verify clients").because(error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config =
        builder.with_single_cert(chain, key).map_err(|error| unusable(&files.cert, error))?;
    // The client resumes no session, and tickets would arrive amid the transmission phase.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// TLS parameters of a client for one server.
#[derive(Clone)]
pub struct ClientTls {
    /// The configuration.
    pub config: Arc<ClientConfig>,
    /// The name that the server's certificate must have.
    pub server: ServerName<'static>,
}

/// The parameters in an NBD URI. Its `tls-certificates` names a directory: the authority is in
/// `ca-cert.pem` and, if the server wants one, the client's own certificate in `client-cert.pem`
/// and `client-key.pem` (the names libnbd uses).
///
/// # Errors
/// Names the file that cannot be used, and why; or an authentication other than by certificates.
pub fn client_tls(uri: &NbdUri) -> Result<ClientTls, Error> {
    let options = &uri.tls_options;
    let unsupported =
        |what| Err(Error::new(ErrorKind::Unsupported, "tls", format!("{uri}: {what}")));
    if options.psk_file.is_some() || matches!(options.kind, Some(TlsKind::Psk | TlsKind::Anon)) {
        return unsupported("only certificates (tls-type=x509) are supported");
    }
    if options.verify_peer == Some(false) {
        return unsupported("servers are always verified; leave tls-verify-peer out");
    }
    let Some(directory) = &options.certificates else {
        return unsupported("add tls-certificates=DIR with ca-cert.pem in it to the URI");
    };
    let roots = authorities(&directory.join("ca-cert.pem"), "the authority of the server")?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(no_versions)?
        .with_root_certificates(roots);
    let own = directory.join("client-cert.pem");
    let config = if own.exists() {
        let key = private_key(&directory.join("client-key.pem"))?;
        builder
            .with_client_auth_cert(certificates(&own, "the client's certificate")?, key)
            .map_err(|error| unusable(&own, error))?
    } else {
        builder.with_no_client_auth()
    };
    let host = match (&options.hostname, &uri.transport) {
        (Some(name), _) | (None, Transport::Tcp { host: name, .. }) => name.clone(),
        (None, _) => "localhost".to_owned(),
    };
    let server = ServerName::try_from(host)
        .map_err(|error| Error::new(ErrorKind::Invalid, "tls", uri.to_string()).because(error))?;
    Ok(ClientTls { config: Arc::new(config), server })
}

fn no_versions(error: rustls::Error) -> Error {
    Error::new(ErrorKind::Unsupported, "tls", "TLS 1.2 and 1.3").because(error)
}

/// Explains what is wrong with a certificate, ours or a peer's, where rustls only names the error.
fn explain(error: &rustls::Error) -> String {
    let details = format!("{error:?}");
    let known = |name: &str| details.contains(name);
    let why = if known("UnsupportedCertVersion") {
        "the certificate is of X.509 version 1, and TLS needs version 3; make it with extensions \
         (openssl x509 -req -extfile, or openssl req -x509)"
    } else if known("CaUsedAsEndEntity") {
        "the certificate is an authority's (as self-signed ones are by default), which cannot be a \
         server's or client's own; make one with basicConstraints=CA:false"
    } else if known("UnknownRevocationStatus") {
        "its authority has no revocation list among those of --tls-client-crl; add one, which may \
         be empty"
    } else if known("AlertReceived(CertificateRequired)") {
        "the server wants a certificate of its client; put client-cert.pem and client-key.pem into \
         the directory that tls-certificates names"
    } else if known("UnknownIssuer") {
        return format!(
            "{error}: it is of none of the authorities that are given here (those of servers are \
             in ca-cert.pem, those of clients in --tls-client-ca)"
        );
    } else if known("NotValidForName") {
        return format!("{error}; use a name that it has, as the host or as tls-hostname=NAME");
    } else {
        return error.to_string();
    };
    why.to_owned()
}

/// Like [`explain`], for errors of the streams of rustls.
#[must_use]
pub fn explain_io(error: io::Error) -> io::Error {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).map(explain);
    match tls {
        Some(why) => io::Error::new(error.kind(), why),
        None => error,
    }
}

/// Why our own certificate cannot be used.
fn unusable(path: &Path, error: rustls::Error) -> Error {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            invalid(path, "does not go with its key; give the key that it was made with")
        }
        error => invalid(path, &explain(&error)),
    }
}

/// The names in the certificate of a verified client: common names, then DNS names. Empty without a
/// certificate.
#[must_use]
pub fn client_names(tls: &ServerConnection) -> Vec<String> {
    let Some(own) = tls.peer_certificates().and_then(|chain| chain.first()) else {
        return Vec::new();
    };
    // The same parser has verified it.
    let Ok(cert) = EndEntityCert::try_from(own) else { return Vec::new() };
    let names = der::common_names(cert.subject()).into_iter().chain(cert.valid_dns_names());
    names.map(str::to_owned).collect()
}
