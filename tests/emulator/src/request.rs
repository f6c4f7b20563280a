//! What a request asks: kind, bucket, key, parameters.

use std::fmt::Write as _;
use std::ops::Range;

use hyper::Method;
use hyper::http::request::Parts;

use crate::log::Kind;

/// A request without its body.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) kind: Kind,
    pub(crate) bucket: String,
    pub(crate) key: String,
    /// Names and values, decoded, in the request's order.
    pub(crate) query: Vec<(String, String)>,
}

impl Asked {
    /// `None` if the path or the query is no UTF-8.
    pub(crate) fn of(parts: &Parts) -> Option<Self> {
        let path = parts.uri.path().strip_prefix('/').unwrap_or_default();
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        let (bucket, key) = (decode(bucket)?, decode(key)?);
        let pairs = parts.uri.query().unwrap_or_default().split('&');
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(name)?, decode(value)?))
        };
        let query: Option<Vec<_>> = pairs.filter(|text| !text.is_empty()).map(pair).collect();
        let mut asked = Self { kind: Kind::Other, bucket, key, query: query? };
        asked.kind = asked.kind_of(parts);
        Some(asked)
    }

    fn kind_of(&self, parts: &Parts) -> Kind {
        if self.bucket.is_empty() {
            return Kind::Other;
        }
        // The SDKs name the operation.
        let is_plain = self.query.iter().all(|(name, _)| name == "x-id");
        if !self.key.is_empty() {
            return match parts.method {
                _ if !is_plain => Kind::Other,
                Method::PUT if parts.headers.contains_key("x-amz-copy-source") => Kind::Other,
                Method::PUT => Kind::Put,
                Method::GET => Kind::Get,
                Method::HEAD => Kind::Head,
                Method::DELETE => Kind::Delete,
                _ => Kind::Other,
            };
        }
        match parts.method {
            Method::GET if self.param("location").is_some() => Kind::Bucket,
            Method::GET
                if ["uploads", "versions", "policy", "versioning", "lifecycle"]
                    .iter()
                    .any(|name| self.param(name).is_some()) =>
            {
                Kind::Other
            }
            Method::GET => Kind::List,
            Method::PUT | Method::HEAD | Method::DELETE if is_plain => Kind::Bucket,
            _ => Kind::Other,
        }
    }

    /// A parameter's value.
    pub(crate) fn param(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// What the log and the rules call its key.
    pub(crate) fn name(&self) -> &str {
        if self.kind == Kind::List { self.param("prefix").unwrap_or_default() } else { &self.key }
    }
}

/// Part of an object, as a Range header asks for it. An error if there is none of it; `None` if
/// the header is to be ignored.
pub(crate) fn range(header: &str, len: u64) -> Result<Option<Range<u64>>, ()> {
    let Some((first, last)) = header.strip_prefix("bytes=").and_then(|range| range.split_once('-'))
    else {
        return Ok(None);
    };
    let number = |text: &str| text.parse::<u64>().ok();
    let range = match (number(first), number(last)) {
        (Some(first), Some(last)) if first > last => return Ok(None),
        (Some(first), Some(last)) => first..len.min(last.saturating_add(1)),
        (Some(first), None) if last.is_empty() => first..len,
        (None, Some(count)) if first.is_empty() => len.saturating_sub(count)..len,
        _ => return Ok(None),
    };
    if range.start >= range.end { Err(()) } else { Ok(Some(range)) }
}

/// Decodes percent signs. `None` if it is no UTF-8 then.
pub(crate) fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let code = behind.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(code) if first == b'%' => {
                bytes.push(code);
                rest = &behind[2..];
            }
            _ => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// Encodes all but letters, digits, `-._~` and those of `kept`.
pub(crate) fn encode(text: &str, kept: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        let is_kept = byte.is_ascii_alphanumeric()
            || b"-._~".contains(&byte)
            || kept.as_bytes().contains(&byte);
        if is_kept {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("a string has room");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_object() {
        assert_eq!(range("bytes=0-9", 100), Ok(Some(0..10)));
        assert_eq!(range("bytes=90-199", 100), Ok(Some(90..100)));
        assert_eq!(range("bytes=90-", 100), Ok(Some(90..100)));
        assert_eq!(range("bytes=-5", 100), Ok(Some(95..100)));
        assert_eq!(range("bytes=-500", 100), Ok(Some(0..100)));
        assert_eq!(range("bytes=100-", 100), Err(()));
        assert_eq!(range("bytes=0-0", 0), Err(()));
        assert_eq!(range("bytes=5-4", 100), Ok(None));
        assert_eq!(range("lines=5-4", 100), Ok(None));
        assert_eq!(range("bytes=0-18446744073709551615", 100), Ok(Some(0..100)));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        assert_eq!(encode("a/b c+ä", "/"), "a/b%20c%2B%C3%A4");
        assert_eq!(encode("a/b", ""), "a%2Fb");
        for text in ["a/b c+ä%", "%%2", "~-_.", ""] {
            assert_eq!(decode(&encode(text, "")).as_deref(), Some(text));
        }
        assert_eq!(decode("%ff"), None);
    }
}
