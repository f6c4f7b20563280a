//! Percent escapes of URIs (RFC 3986, section 2.1).

use std::borrow::Cow;

/// Undoes `%E9` escapes. `None` when a `%` has no two hexadecimal digits behind it.
#[must_use]
pub fn percent_decode(text: &str) -> Option<Cow<'_, [u8]>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text.as_bytes()));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                // Two hexadecimal digits fit into a byte.
                (high << 4 | low) as u8
            }
            byte => byte,
        });
    }
    Some(Cow::Owned(out))
}

/// Keeps some characters, and writes the bytes of all others as `%E9`.
#[must_use]
pub fn percent_encode(bytes: &[u8], is_kept: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match is_kept(character) {
                true => out.push(character),
                false => push_escaped(&mut out, character.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        push_escaped(&mut out, chunk.invalid());
    }
    out
}

fn push_escaped(out: &mut String, bytes: &[u8]) {
    out.extend(bytes.iter().map(|byte| format!("%{byte:02X}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone_and_broken_ones_are_not_guessed() {
        for text in ["%", "%4", "%zz", "a%+1", "%é"] {
            assert!(percent_decode(text).is_none(), "{text}");
        }
        assert_eq!(*percent_decode("a%fF%25").unwrap(), *b"a\xff%");
        assert!(matches!(percent_decode("a b").unwrap(), Cow::Borrowed(b"a b")));
    }

    #[test]
    fn all_bytes_come_back() {
        let bytes: Vec<u8> = (0..=255).chain("éß".bytes()).collect();
        let encoded = percent_encode(&bytes, char::is_alphanumeric);
        assert!(encoded.ends_with("éß") && encoded.contains("%FF"), "{encoded}");
        assert_eq!(*percent_decode(&encoded).unwrap(), bytes);
    }
}
