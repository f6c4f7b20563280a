//! TLS by rustls, in user space: certificates from files, and the stream a session runs on.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use sheave_core::{Error, ErrorKind};
use sheave_ring::SendBatch;

/// Bytes of plain text taken out of a record at once: the longest record.
const RECORD_LEN: usize = 16 << 10;

/// Where the server's identity is, in PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificate authorities of the clients; without it any client is let in.
    pub client_ca: Option<PathBuf>,
}

/// A configuration for TLS 1.2 and 1.3 from files.
///
/// # Errors
/// Which file cannot be used, and why.
pub fn server_tls(files: &TlsFiles) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|error| invalid(&files.key, "no private key in PEM").because(error))?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::new(ErrorKind::Invalid, "tls", "versions").because(error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for cert in certificates(path)? {
                roots
                    .add(cert)
                    .map_err(|error| invalid(path, "not a certificate authority").because(error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| invalid(path, "cannot verify clients").because(error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| invalid(&files.cert, "does not go with its key").because(error))?;
    // Tickets would come as records in the middle of the transmission phase; nobody resumes.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certs = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(path, "not PEM").because(error))?;
    if certs.is_empty() {
        return Err(invalid(path, "no certificate in it"));
    }
    Ok(certs)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| Error::from_io("tls", path.display().to_string(), error))
}

fn invalid(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Invalid, "tls", format!("{}: {what}", path.display()))
}

/// A negotiated connection's cipher state.
pub(crate) struct TlsStream {
    tls: ServerConnection,
    bounce: Vec<u8>,
    closed: bool,
}

impl TlsStream {
    pub(crate) fn new(mut tls: ServerConnection) -> Self {
        // A batch is bounded by what the session holds; rustls need not bound it again.
        tls.set_buffer_limit(None);
        Self { tls, bounce: Vec::new(), closed: false }
    }

    /// Decrypts what arrived and hands out the plain bytes, also those left from the handshake.
    pub(crate) fn decrypt(
        &mut self,
        mut bytes: &[u8],
        mut plain: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let mut out = [0; RECORD_LEN];
        loop {
            loop {
                match self.tls.reader().read(&mut out) {
                    Ok(0) => return Ok(()),
                    Ok(count) => plain(&out[..count]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            if bytes.is_empty() {
                return Ok(());
            }
            self.tls.read_tls(&mut bytes)?;
            self.tls.process_new_packets().map_err(io::Error::other)?;
        }
    }

    /// Encrypts a batch, and says goodbye after it if it is the last.
    pub(crate) fn encrypt(&mut self, batch: &SendBatch, last: bool, out: &mut SendBatch) {
        let Self { tls, bounce, closed } = self;
        batch.visit(bounce, |bytes| {
            tls.writer().write_all(bytes).expect("writing to memory without a limit");
        });
        if last && !*closed {
            tls.send_close_notify();
            *closed = true;
        }
        if tls.wants_write() {
            out.head(|head| {
                while tls.wants_write() {
                    tls.write_tls(head).expect("writing to memory");
                }
            });
        }
    }
}
