//! The part of DER (X.690) that is needed to describe a certificate or a key. Only rustls verifies
//! them.

use rustls::pki_types::PrivateKeyDer;

const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
/// UTF8String, PrintableString, IA5String: those that are UTF-8.
const TEXTS: [u8; 3] = [0x0c, 0x13, 0x16];

/// 2.5.4.3, `id-at-commonName` (RFC 5280, appendix A.1).
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// 1.2.840.113549.1.1.1, `rsaEncryption` (RFC 8017, appendix C).
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];

/// Elements that follow each other, as tag and content; ends at the first that is malformed.
struct Elements<'a>(&'a [u8]);

impl<'a> Iterator for Elements<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let [tag, short, rest @ ..] = self.0 else { return None };
        let (len, rest) = match *short {
            len @ 0..0x80 => (usize::from(len), rest),
            long => {
                let (len, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
                if len.len() > size_of::<u32>() {
                    return None;
                }
                let byte = |sum: usize, byte: &u8| sum << 8 | usize::from(*byte);
                (len.iter().fold(0, byte), rest)
            }
        };
        let (content, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((*tag, content))
    }
}

/// The content of the next element, if it has this tag.
fn content<'a>(elements: &mut Elements<'a>, tag: u8) -> Option<&'a [u8]> {
    elements.next().filter(|(found, _)| *found == tag).map(|(_, content)| content)
}

/// The common names in a certificate's subject (`RDNSequence`, RFC 5280, section 4.1.2.4).
pub(super) fn common_names(subject: &[u8]) -> Vec<&str> {
    let pairs = Elements(subject).flat_map(|(_, set)| Elements(set));
    let names = pairs.filter_map(|(_, pair)| {
        let mut pair = Elements(pair);
        content(&mut pair, OID).filter(|kind| *kind == COMMON_NAME)?;
        let (_, text) = pair.next().filter(|(tag, _)| TEXTS.contains(tag))?;
        std::str::from_utf8(text).ok()
    });
    names.collect()
}

/// How long an RSA key is (RFC 8017, appendix A.1.2); `None` for keys of other kinds.
pub(super) fn rsa_bits(key: &PrivateKeyDer<'_>) -> Option<usize> {
    let inside = |der| content(&mut Elements(der), SEQUENCE).map(Elements);
    let mut fields = match key {
        PrivateKeyDer::Pkcs1(key) => inside(key.secret_pkcs1_der())?,
        PrivateKeyDer::Pkcs8(key) => {
            let mut fields = inside(key.secret_pkcs8_der())?;
            content(&mut fields, INTEGER)?;
            let algorithm = content(&mut fields, SEQUENCE)?;
            content(&mut Elements(algorithm), OID).filter(|kind| *kind == RSA)?;
            inside(content(&mut fields, OCTET_STRING)?)?
        }
        _ => return None,
    };
    content(&mut fields, INTEGER)?;
    let modulus = content(&mut fields, INTEGER)?;
    let zeroes = modulus.iter().take_while(|&&byte| byte == 0).count();
    let first = modulus.get(zeroes)?;
    Some((modulus.len() - zeroes) * 8 - first.leading_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names_are_found_and_nothing_else() {
        // C=DE, CN=client (UTF8String), CN=backup (PrintableString)
        let country = [0x31, 0x0b, 0x30, 0x09, 6, 3, 0x55, 4, 6, 0x13, 2, b'D', b'E'];
        let name = |tag: u8, text: &[u8; 6]| {
            let mut set = vec![0x31, 0x0f, 0x30, 0x0d, 6, 3, 0x55, 4, 3, tag, 6];
            set.extend(text);
            set
        };
        let subject = [country.to_vec(), name(0x0c, b"client"), name(0x13, b"backup")].concat();
        assert_eq!(common_names(&subject), ["client", "backup"]);
        // BMPString is UTF-16.
        assert!(common_names(&name(0x1e, b"client")).is_empty());
        for len in 0..subject.len() {
            assert!(common_names(&subject[..len]).len() < 2, "{len}");
        }
        assert!(common_names(&[0x31, 0x88, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_empty());
    }
}
