//! Switches and URL parameters, with errors that say what is wrong.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use sheave_core::{Error, ErrorKind, Result, parse_size, printable};

/// The parameters of a URL. A scheme and the layers take those that they know; the rest is unknown.
#[derive(Debug)]
pub(crate) struct Parameters {
    /// The location that they belong to, for messages.
    owner: String,
    /// Names, and values with their escapes: a value may be a path, which is bytes.
    pairs: Vec<(String, String)>,
    known: Vec<&'static str>,
    /// The end of the message about an unknown one.
    hint: &'static str,
}

impl Parameters {
    /// Splits `name=value&…`.
    pub(crate) fn parse(owner: &str, query: &str) -> Result<Self> {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            // A wrong escape is an error even in an unknown parameter.
            percent_decode_bytes(value)?;
            Ok((percent_decode(name)?.into_owned(), value.to_owned()))
        });
        let pairs = pairs.collect::<Result<_>>()?;
        Ok(Self { owner: owner.to_owned(), pairs, known: vec![], hint: "" })
    }

    /// Whether there is a parameter of a name that was not taken.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.pairs.iter().any(|(have, _)| have == name)
    }

    /// Takes all parameters of a name, with their escapes.
    pub(crate) fn take_raw(&mut self, name: &'static str) -> Vec<String> {
        self.known.push(name);
        let taken = self.pairs.extract_if(.., |(have, _)| have == name);
        taken.map(|(_, value)| value).collect()
    }

    /// Takes all parameters of a name.
    pub(crate) fn take_all(&mut self, name: &'static str) -> Result<Vec<String>> {
        let raw = self.take_raw(name);
        raw.iter().map(|value| percent_decode(value).map(Cow::into_owned)).collect()
    }

    /// Takes a parameter that may be given once.
    pub(crate) fn take(&mut self, name: &'static str) -> Result<Option<String>> {
        let mut values = self.take_all(name)?;
        match values.len() {
            0 | 1 => Ok(values.pop()),
            _ => Err(self.wrong(&format!("{name}= is given more than once; give it once"))),
        }
    }

    /// Takes a path.
    pub(crate) fn take_path(&mut self, name: &'static str) -> Result<Option<PathBuf>> {
        match &self.take_raw(name)[..] {
            [] => Ok(None),
            [path] if !path.is_empty() => {
                Ok(Some(PathBuf::from(OsStr::from_bytes(&percent_decode_bytes(path)?))))
            }
            _ => Err(self.wrong(&format!("{name}= takes one path; give it once"))),
        }
    }

    /// Takes a switch; a name without a value means `true`.
    pub(crate) fn take_switch(&mut self, name: &'static str) -> Result<Option<bool>> {
        match self.take(name)?.as_deref() {
            None => Ok(None),
            Some("" | "true" | "yes" | "on" | "1") => Ok(Some(true)),
            Some("false" | "no" | "off" | "0") => Ok(Some(false)),
            Some(other) => Err(self.wrong(&format!("{name}={other}: write true or false"))),
        }
    }

    /// Takes a number of bytes.
    pub(crate) fn take_bytes(&mut self, name: &'static str) -> Result<Option<u64>> {
        let Some(text) = self.take(name)? else { return Ok(None) };
        let why = "is not a size in bytes; write for example 4096, 64K, 10G or 1T";
        let bytes = parse_size(&text);
        bytes.map(Some).map_err(|_| self.wrong(&format!("{name}: \"{text}\" {why}")))
    }

    /// Sets the end of the message about an unknown parameter.
    pub(crate) fn set_hint(&mut self, hint: &'static str) {
        self.hint = hint;
    }

    /// Refuses parameters that have not been taken.
    pub(crate) fn finish(&self) -> Result<()> {
        self.refuse_all_but(&[])
    }

    /// Refuses parameters that have not been taken, except for those that will be.
    pub(crate) fn refuse_all_but(&self, later: &[&str]) -> Result<()> {
        let mut left = self.pairs.iter().map(|(name, _)| name.as_str());
        let Some(name) = left.find(|name| !later.contains(name)) else { return Ok(()) };
        let (known, hint) = (self.known.iter().chain(later).copied(), self.hint);
        let known = known.collect::<Vec<_>>().join(", ");
        let name = printable(name);
        Err(self.wrong(&format!("unknown parameter \"{name}\"; known here: {known}{hint}")))
    }

    /// An error about these parameters.
    pub(crate) fn wrong(&self, why: &str) -> Error {
        invalid("parse volume", format!("\"{}\": {why}", printable(&self.owner)))
    }
}

/// Decodes `%41` escapes of text.
pub(crate) fn percent_decode(text: &str) -> Result<Cow<'_, str>> {
    match percent_decode_bytes(text)? {
        Cow::Borrowed(_) => Ok(Cow::Borrowed(text)),
        Cow::Owned(bytes) => String::from_utf8(bytes).map(Cow::Owned).map_err(|_| {
            invalid("parse volume", format!("\"{}\": its escapes are no UTF-8", printable(text)))
        }),
    }
}

/// Decodes `%E9` escapes.
pub(crate) fn percent_decode_bytes(text: &str) -> Result<Cow<'_, [u8]>> {
    sheave_core::percent_decode(text).ok_or_else(|| {
        let why = "% must begin an escape of two hexadecimal digits; write % itself as %25";
        invalid("parse volume", format!("\"{}\": {why}", printable(text)))
    })
}

/// The error for a text that is no volume.
pub(crate) fn invalid(op: &'static str, context: String) -> Error {
    Error::new(ErrorKind::Invalid, op, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_taken_once_and_the_rest_is_refused() {
        let mut params = Parameters::parse("x:", "a=1&b=%41%2f&&c&fault=1&fault=2").unwrap();
        assert_eq!(params.take("a").unwrap().as_deref(), Some("1"));
        assert_eq!(params.take("b").unwrap().as_deref(), Some("A/"));
        assert!(params.take("fault").unwrap_err().to_string().contains("more than once"));
        assert_eq!(params.take("absent").unwrap(), None);
        let error = params.finish().unwrap_err().to_string();
        assert!(
            error.contains("\"x:\": unknown parameter \"c\"; known here: a, b, fault"),
            "{error}"
        );
        assert_eq!(params.take_switch("c").unwrap(), Some(true));
        assert!(params.finish().is_ok());
    }

    #[test]
    fn broken_escapes_are_refused() {
        for text in ["%", "%4", "%zz", "a%+1"] {
            assert!(percent_decode(text).is_err(), "{text}");
            assert!(percent_decode_bytes(text).is_err(), "{text}");
        }
        assert!(percent_decode("%ff").is_err(), "text is UTF-8");
        assert_eq!(*percent_decode_bytes("a%ff%25").unwrap(), *b"a\xff%");
        assert_eq!(percent_decode("a%20b").unwrap(), "a b");
    }
}
