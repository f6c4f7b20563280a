//! Certificates, made by openssl.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
use sheave_tls::TlsFiles;
use tempfile::TempDir;

/// An authority with certificates for a server and a client, in files with the names that NBD URIs
/// use.
pub(crate) struct Certificates {
    dir: TempDir,
}

impl Certificates {
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
            -keyout ca-key.pem -out ca-cert.pem -subj /CN=authority \
            -addext keyUsage=critical,keyCertSign";
        openssl(dir.path(), authority);
        for (name, extension) in
            [("server", "subjectAltName=DNS:localhost"), ("client", "extendedKeyUsage=clientAuth")]
        {
            let request = format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
                 -keyout {name}-key.pem -out {name}.csr -subj /CN={name}"
            );
            openssl(dir.path(), &request);
            let extensions = format!("basicConstraints=critical,CA:false\n{extension}\n");
            std::fs::write(dir.path().join("extensions"), extensions).unwrap();
            let sign = format!(
                "x509 -req -days 2 -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
                 -in {name}.csr -out {name}-cert.pem -extfile extensions"
            );
            openssl(dir.path(), &sign);
        }
        Self { dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The configuration of a server that requires certificates of its clients.
    pub(crate) fn server(&self) -> Arc<rustls::ServerConfig> {
        let files = TlsFiles {
            cert: self.file("server-cert.pem"),
            key: self.file("server-key.pem"),
            client_ca: Some(self.file("ca-cert.pem")),
            client_crl: None,
        };
        sheave_tls::server_tls(&files).unwrap()
    }

    /// A client that trusts this authority and uses a certificate of `own`.
    pub(crate) fn client(
        &self,
        own: Option<&Self>,
        version: &'static SupportedProtocolVersion,
    ) -> ClientConnection {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.file("ca-cert.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let cert = CertificateDer::from_pem_file(own.file("client-cert.pem")).unwrap();
                let key = PrivateKeyDer::from_pem_file(own.file("client-key.pem")).unwrap();
                builder.with_client_auth_cert(vec![cert], key).unwrap()
            }
        };
        ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap()
    }
}

fn openssl(dir: &Path, args: &str) {
    let output = Command::new("openssl").args(args.split_whitespace()).current_dir(dir).output();
    let output = output.expect("openssl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
