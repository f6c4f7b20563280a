//! Certificates, keys and revocation lists in files, PEM or DER. Errors say what is wrong and what
//! to do about it, and contain nothing of a key.

use std::fs;
use std::path::Path;

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use sheave_core::{Error, ErrorKind, printable};
use webpki::{BorrowedCertRevocationList, CertRevocationList};

use super::der::{common_names, rsa_bits};

/// The forms of keys that are accepted, for messages about others.
const NEW_KEY: &str = "make a new one and a certificate for it, such as by \
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256";

/// The content of a file by its PEM labels.
struct Content {
    bytes: Vec<u8>,
}

impl Content {
    fn read(path: &Path) -> Result<Self, Error> {
        let fail = |error| Error::from_io("tls", printable(&path).to_string(), error);
        let bytes = fs::read(path).map_err(fail)?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Err(invalid(path, "is empty"));
        }
        Ok(Self { bytes })
    }

    fn has(&self, text: &str) -> bool {
        self.bytes.windows(text.len()).any(|window| window == text.as_bytes())
    }

    fn is_pem(&self) -> bool {
        self.has("-----BEGIN ")
    }

    /// Describes the content found in place of the expected one.
    fn instead(&self) -> &'static str {
        if self.has("CERTIFICATE REQUEST-----") {
            "a certificate request; give the certificate that the authority made from it"
        } else if self.has("PRIVATE KEY-----") {
            "a private key; has it been mistaken for the certificate?"
        } else if self.has("BEGIN CERTIFICATE-----") {
            "a certificate; has it been mistaken for the key?"
        } else if self.has("PUBLIC KEY-----") {
            "a public key"
        } else if self.has("BEGIN X509 CRL-----") {
            "a revocation list"
        } else {
            "neither PEM nor DER"
        }
    }
}

pub(super) fn authorities(path: &Path, purpose: &str) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(path, purpose)? {
        roots
            .add(cert)
            .map_err(|error| invalid(path, "not a certificate authority").because(error))?;
    }
    Ok(roots)
}

/// `purpose` names the expected content of the file.
pub(super) fn certificates(
    path: &Path,
    purpose: &str,
) -> Result<Vec<CertificateDer<'static>>, Error> {
    let content = Content::read(path)?;
    if !content.is_pem() {
        // An authority's or our own certificate is parsed when it is used; here it need only be a
        // sequence, as all of them are.
        return match content.bytes.first() {
            Some(0x30) => Ok(vec![content.bytes.into()]),
            _ => Err(wanted(path, purpose, content.instead())),
        };
    }
    let certs = CertificateDer::pem_slice_iter(&content.bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(path, "not PEM").because(error))?;
    if certs.is_empty() {
        return Err(wanted(path, purpose, content.instead()));
    }
    Ok(certs)
}

/// Revocation lists, one or several in PEM, of which no two are for the same certificates: rustls
/// would use only the first of them, which may be the older one.
pub(super) fn revocation_lists(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, Error> {
    let content = Content::read(path)?;
    let purpose = "revocation lists of the clients' authorities";
    if !content.is_pem() {
        return match content.bytes.first() {
            Some(0x30) => Ok(vec![content.bytes.into()]),
            _ => Err(wanted(path, purpose, content.instead())),
        };
    }
    let lists = CertificateRevocationListDer::pem_slice_iter(&content.bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(path, "not PEM").because(error))?;
    if lists.is_empty() {
        // The hints about a certificate and its key do not apply here.
        let instead = content.instead().split(';').next().unwrap_or_default();
        return Err(wanted(path, purpose, instead));
    }
    let parsed = lists.iter().map(|list| BorrowedCertRevocationList::from_der(list));
    let parsed = parsed
        .map(|list| list.map(CertRevocationList::from))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(path, "not a revocation list").because(error))?;
    for (index, list) in parsed.iter().enumerate() {
        if parsed[..index].iter().any(|before| are_of_same_scope(before, list)) {
            let names = common_names(list.issuer()).join(", ");
            let why = format!("two lists of one authority ({names}); keep only the newest");
            return Err(invalid(path, &why));
        }
    }
    Ok(lists)
}

/// Whether both may be for the same certificates: they are of one authority, and no two parts of
/// all that it has revoked (`issuingDistributionPoint`, RFC 5280, section 5.2.5).
fn are_of_same_scope(one: &CertRevocationList<'_>, other: &CertRevocationList<'_>) -> bool {
    let points = [one, other].map(CertRevocationList::issuing_distribution_point);
    one.issuer() == other.issuer() && (points.contains(&None) || points[0] == points[1])
}

pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let content = Content::read(path)?;
    if content.has("BEGIN ENCRYPTED PRIVATE KEY") || content.has("Proc-Type: 4,ENCRYPTED") {
        let file = printable(&path);
        let why = format!(
            "the key has a passphrase, which a server cannot ask for; take it off: \
             (umask 077; openssl pkey -in {file} -out {file}.plain)"
        );
        return Err(invalid(path, &why));
    }
    let purpose = "a private key";
    let key = if content.is_pem() {
        PrivateKeyDer::from_pem_slice(&content.bytes)
            .map_err(|_| wanted(path, purpose, content.instead()))?
    } else {
        PrivateKeyDer::try_from(content.bytes.as_slice())
            .map_err(|_| wanted(path, purpose, content.instead()))?
            .clone_key()
    };
    match (any_supported_type(&key), rsa_bits(&key)) {
        (Ok(_), _) => Ok(key),
        (Err(_), Some(bits)) => {
            let why = format!("an RSA key of {bits} bits; 2048 to 8192 are supported: {NEW_KEY}");
            Err(invalid(path, &why))
        }
        (Err(_), None) => {
            let why = "not a key of RSA, ECDSA (P-256, P-384, P-521) or Ed25519, or damaged";
            Err(invalid(path, &format!("{why}: {NEW_KEY}")))
        }
    }
}

fn wanted(path: &Path, purpose: &str, instead: &str) -> Error {
    invalid(path, &format!("wanted is {purpose}, in PEM or DER; it holds {instead}"))
}

pub(super) fn invalid(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Invalid, "tls", format!("{}: {what}", printable(&path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_in_place_of_a_revocation_list_is_no_mistaken_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crl.pem");
        fs::write(&path, "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n").unwrap();
        let said = revocation_lists(&path).unwrap_err().to_string();
        assert!(said.contains("revocation lists of") && said.ends_with("a certificate"), "{said}");
    }
}
