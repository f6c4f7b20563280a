//! TLS as a URL's `tls-…` parameters want it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use sheave_proto::uri::{NbdUri, TlsKind, Transport};

/// Files in the directory that `tls-certificates` names; the names are those of libnbd and qemu.
const CA: &str = "ca-cert.pem";
const CLIENT_CERTIFICATE: &str = "client-cert.pem";
const CLIENT_KEY: &str = "client-key.pem";

/// The configuration for a URL, and the name to expect in the server's certificate.
///
/// # Errors
/// When certificates are missing or bad, or the URL wants other means than certificates.
pub(crate) fn client(uri: &NbdUri) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
    let options = &uri.tls_options;
    ensure!(
        matches!(options.kind, None | Some(TlsKind::X509)) && options.psk_file.is_none(),
        "only tls-type=x509 is supported"
    );
    ensure!(options.verify_peer != Some(false), "the server's certificate is always verified");
    let Some(dir) = &options.certificates else {
        bail!("add tls-certificates=DIR to the URL, where DIR holds {CA}");
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&dir.join(CA))? {
        roots.add(certificate).with_context(|| format!("{}/{CA}", dir.display()))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = match dir.join(CLIENT_CERTIFICATE) {
        path if path.exists() => {
            builder.with_client_auth_cert(certificates(&path)?, key(&dir.join(CLIENT_KEY))?)?
        }
        _ => builder.with_no_client_auth(),
    };
    let name = match (&options.hostname, &uri.transport) {
        (Some(name), _) => name.clone(),
        (None, Transport::Tcp { host, .. }) => host.clone(),
        (None, _) => "localhost".to_owned(),
    };
    let name = ServerName::try_from(name.clone())
        .with_context(|| format!("{name} is no name that a certificate could have"))?;
    Ok((Arc::new(config), name))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let context = || format!("certificates in {}", path.display());
    let pem = fs::read(path).with_context(context)?;
    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().with_context(context)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let context = || format!("private key in {}", path.display());
    let pem = fs::read(path).with_context(context)?;
    PrivateKeyDer::from_pem_slice(&pem).with_context(context)
}
