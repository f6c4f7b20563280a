//! Certificates for TLS tests, made by openssl.

use std::fs;
use std::path::Path;

use crate::{Run, Scratch};

/// A certificate authority, a server and a client, in the file names that libnbd and qemu want.
#[derive(Debug)]
pub struct Certificates {
    dir: Scratch,
}

impl Certificates {
    /// Makes new ones.
    #[must_use]
    pub fn new() -> Self {
        let dir = Scratch::new();
        authority(dir.path());
        issue(dir.path(), "server", "subjectAltName=DNS:localhost,IP:127.0.0.1");
        issue(dir.path(), "client", "extendedKeyUsage=clientAuth");
        Self { dir }
    }

    /// The directory that libnbd and qemu look into.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The same authority, but no client certificate.
    #[must_use]
    pub fn without_client(&self) -> Scratch {
        let dir = Scratch::new();
        fs::copy(self.file("ca-cert.pem"), dir.file("ca-cert.pem")).expect("copy a certificate");
        dir
    }

    /// A client of another authority, that trusts this one.
    #[must_use]
    pub fn stranger(&self) -> Self {
        let stranger = Self::new();
        fs::copy(self.file("ca-cert.pem"), stranger.file("ca-cert.pem"))
            .expect("copy a certificate");
        stranger
    }

    /// A directory for another client of this authority, whose certificate has these names.
    #[must_use]
    pub fn client(&self, common_name: &str, dns_name: Option<&str>) -> Scratch {
        let mut extension = "extendedKeyUsage=clientAuth".to_owned();
        if let Some(name) = dns_name {
            extension += &format!("\nsubjectAltName=DNS:{name}");
        }
        issue(self.dir.path(), common_name, &extension);
        let dir = self.without_client();
        for end in ["cert.pem", "key.pem"] {
            let own = self.file(&format!("{common_name}-{end}"));
            fs::copy(own, dir.file(&format!("client-{end}"))).expect("copy a certificate");
        }
        dir
    }

    /// Issues the server another certificate, with another key.
    pub fn renew_server(&self) {
        issue(self.dir.path(), "server", "subjectAltName=DNS:localhost,IP:127.0.0.1");
    }

    /// Issues the server another certificate, whose time is over.
    pub fn expire_server(&self) {
        let config = "[ca]\ndefault_ca = d\n[d]\ndatabase = old.txt\nrand_serial = yes\n\
                      new_certs_dir = .\ndefault_md = sha256\n\
                      policy = p\n[p]\ncommonName = supplied\n";
        fs::write(self.file("old.cnf"), config).expect("write a file");
        fs::write(self.file("old.txt"), "").expect("write a file");
        openssl(
            self.dir(),
            "ca -config old.cnf -batch -notext -keyfile ca-key.pem -cert ca-cert.pem",
        )
        .args("-startdate 20200101000000Z -enddate 20200102000000Z -extfile extensions")
        .args("-in server.csr -out server-cert.pem")
        .ok();
    }

    /// Writes `crl.pem`: these clients' certificates are revoked.
    pub fn revoke(&self, common_names: &[&str]) {
        let config = "[ca]\ndefault_ca = d\n[d]\ndatabase = index.txt\ncrlnumber = crlnumber\n\
                      default_md = sha256\ndefault_crl_days = 2\ncrl_extensions = e\n\
                      [e]\nauthorityKeyIdentifier = keyid\n";
        for (name, text) in [("ca.cnf", config), ("index.txt", ""), ("crlnumber", "01\n")] {
            fs::write(self.file(name), text).expect("write a file");
        }
        let ca = || openssl(self.dir(), "ca -config ca.cnf -keyfile ca-key.pem -cert ca-cert.pem");
        for name in common_names {
            ca().args(&format!("-revoke {name}-cert.pem")).ok();
        }
        ca().args("-gencrl -out crl.tmp").ok();
        fs::rename(self.file("crl.tmp"), self.file("crl.pem")).expect("rename a file");
    }

    /// The path of one file.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        self.dir.file(name)
    }

    /// The server's arguments for TLS without client certificates.
    #[must_use]
    pub fn server_args(&self) -> Vec<String> {
        let key = ["--tls-cert", "--tls-key"].map(str::to_owned);
        let [cert, key_arg] = key;
        vec![cert, self.file("server-cert.pem"), key_arg, self.file("server-key.pem")]
    }

    /// The server's arguments for TLS with client certificates.
    #[must_use]
    pub fn mutual_args(&self) -> Vec<String> {
        let mut args = self.server_args();
        args.extend(["--tls-client-ca".to_owned(), self.file("ca-cert.pem")]);
        args
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self::new()
    }
}

fn authority(dir: &Path) {
    openssl(dir, "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2")
        .args("-keyout ca-key.pem -out ca-cert.pem -subj /CN=authority")
        .args("-addext keyUsage=critical,keyCertSign,cRLSign")
        .ok();
}

fn issue(dir: &Path, name: &str, extension: &str) {
    openssl(dir, "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes")
        .args(&format!("-keyout {name}-key.pem -out {name}.csr -subj /CN={name}"))
        .ok();
    let extensions = format!(
        "basicConstraints=critical,CA:false\n\
         keyUsage=critical,digitalSignature,keyEncipherment\n{extension}\n"
    );
    fs::write(dir.join("extensions"), extensions).expect("write a file");
    openssl(dir, "x509 -req -days 2 -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial")
        .args(&format!("-in {name}.csr -out {name}-cert.pem -extfile extensions"))
        .ok();
}

fn openssl(dir: &Path, args: &str) -> Run {
    Run::new("openssl").args(args).in_dir(dir)
}
