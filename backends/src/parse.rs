//! Sizes, durations, switches and URL parameters, each with an error that says what is wrong.

use std::borrow::Cow;

use sheave_core::{Error, ErrorKind, Result, printable};

/// Parses a size in bytes: a whole number and a unit of 1024ths, as in `4096`, `64K`, `10G`,
/// `1TiB`.
///
/// # Errors
/// [`ErrorKind::Invalid`] when it is no such number or does not fit into 64 bits.
pub fn parse_size(text: &str) -> Result<u64> {
    const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];
    let bare = text.strip_suffix("iB").unwrap_or(text);
    let (digits, power) = match bare.char_indices().next_back() {
        Some((at, letter)) if letter.is_ascii_alphabetic() => {
            let unit = UNITS.iter().position(|unit| letter.eq_ignore_ascii_case(unit));
            (&bare[..at], unit.map(|unit| unit + 1))
        }
        // `1iB` is not a size.
        _ => (bare, (bare.len() == text.len()).then_some(0)),
    };
    let parsed = power.and_then(|power| {
        let count: u64 = parse_digits(digits)?;
        count.checked_mul(1 << (10 * power))
    });
    parsed.ok_or_else(|| {
        let why = "is not a size in bytes; write for example 4096, 64K, 10G or 1T, below 16E";
        invalid("parse size", format!("\"{text}\" {why}"))
    })
}

/// Parses a number that is at least 1.
pub(crate) fn parse_count(name: &str, text: &str) -> Result<u64> {
    match parse_digits(text) {
        Some(count) if count > 0 => Ok(count),
        _ => Err(invalid("parse", format!("{name}={text}: it must be a whole number above 0"))),
    }
}

/// Parses a time such as `200ms` into nanoseconds.
pub(crate) fn parse_duration_ns(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 4] =
        [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];
    let (digits, unit_ns) =
        UNITS.iter().find_map(|(unit, ns)| Some((text.strip_suffix(unit)?, *ns)))?;
    parse_digits(digits)?.checked_mul(unit_ns)
}

/// Parses decimal digits and nothing else, not even a sign.
pub(crate) fn parse_digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The parameters of a URL. Each is taken out by whoever knows it; what is left is unknown.
#[derive(Debug)]
pub(crate) struct Parameters {
    /// Whose parameters they are, for messages.
    owner: String,
    pairs: Vec<(String, String)>,
    known: Vec<&'static str>,
}

impl Parameters {
    /// Splits `name=value&…`.
    pub(crate) fn parse(owner: &str, query: &str) -> Result<Self> {
        let decode = |text| Ok::<_, Error>(percent_decode(text)?.into_owned());
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(name)?, decode(value)?))
        });
        Ok(Self { owner: owner.to_owned(), pairs: pairs.collect::<Result<_>>()?, known: vec![] })
    }

    /// Takes out all parameters of a name.
    pub(crate) fn take_all(&mut self, name: &'static str) -> Vec<String> {
        self.known.push(name);
        let taken = self.pairs.extract_if(.., |(have, _)| have == name);
        taken.map(|(_, value)| value).collect()
    }

    /// Takes out a parameter that may be given once.
    pub(crate) fn take(&mut self, name: &'static str) -> Result<Option<String>> {
        let mut values = self.take_all(name);
        match values.len() {
            0 | 1 => Ok(values.pop()),
            _ => Err(self.wrong(&format!("{name}= is given more than once; give it once"))),
        }
    }

    /// Takes out a switch; a name without a value means `true`.
    pub(crate) fn take_switch(&mut self, name: &'static str) -> Result<Option<bool>> {
        match self.take(name)?.as_deref() {
            None => Ok(None),
            Some("" | "true" | "yes" | "on" | "1") => Ok(Some(true)),
            Some("false" | "no" | "off" | "0") => Ok(Some(false)),
            Some(other) => Err(self.wrong(&format!("{name}={other}: write true or false"))),
        }
    }

    /// Refuses what nobody has taken; `hint` follows the message.
    pub(crate) fn finish(&self, hint: &str) -> Result<()> {
        self.refuse_all_but(&[], hint)
    }

    /// Refuses what nobody has taken, except for what somebody will.
    pub(crate) fn refuse_all_but(&self, later: &[&str], hint: &str) -> Result<()> {
        let mut left = self.pairs.iter().map(|(name, _)| name.as_str());
        let Some(name) = left.find(|name| !later.contains(name)) else { return Ok(()) };
        let known: Vec<_> = self.known.iter().chain(later).copied().collect();
        let known = known.join(", ");
        Err(self.wrong(&format!("unknown parameter \"{name}\"; known here: {known}{hint}")))
    }

    /// An error about these parameters.
    pub(crate) fn wrong(&self, why: &str) -> Error {
        invalid("parse volume", format!("\"{}\": {why}", printable(&self.owner)))
    }
}

/// Undoes `%41` escapes of text.
pub(crate) fn percent_decode(text: &str) -> Result<Cow<'_, str>> {
    match percent_decode_bytes(text)? {
        Cow::Borrowed(_) => Ok(Cow::Borrowed(text)),
        Cow::Owned(bytes) => String::from_utf8(bytes).map(Cow::Owned).map_err(|_| {
            invalid("parse volume", format!("\"{}\": its escapes are no UTF-8", printable(text)))
        }),
    }
}

/// Undoes `%E9` escapes.
pub(crate) fn percent_decode_bytes(text: &str) -> Result<Cow<'_, [u8]>> {
    if !text.contains('%') {
        return Ok(Cow::Borrowed(text.as_bytes()));
    }
    let wrong = || {
        let why = "% must begin an escape of two hexadecimal digits; write % itself as %25";
        invalid("parse volume", format!("\"{}\": {why}", printable(text)))
    };
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                match (digit(), digit()) {
                    // Two hexadecimal digits fit into a byte.
                    (Some(high), Some(low)) => (high << 4 | low) as u8,
                    _ => return Err(wrong()),
                }
            }
            byte => byte,
        });
    }
    Ok(Cow::Owned(out))
}

pub(crate) fn invalid(op: &'static str, context: String) -> Error {
    Error::new(ErrorKind::Invalid, op, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1 << 10),
            ("64K", 64 << 10),
            ("512M", 512 << 20),
            ("10GiB", 10 << 30),
            ("1T", 1 << 40),
            ("15E", 15 << 60),
        ];
        for (text, want) in good {
            assert_eq!(parse_size(text).unwrap(), want, "{text}");
        }
        for text in [
            "",
            "G",
            "1X",
            "1.5G",
            "-1",
            "+1",
            "16E",
            "1KB",
            "1iB",
            "1 G",
            "99999999999999999999",
            "1µ",
        ] {
            let error = parse_size(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
            assert!(error.to_string().contains(&format!("\"{text}\"")), "{error}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration_ns("7ns"), Some(7));
        assert_eq!(parse_duration_ns("50us"), Some(50_000));
        assert_eq!(parse_duration_ns("200ms"), Some(200_000_000));
        assert_eq!(parse_duration_ns("3s"), Some(3_000_000_000));
        for text in ["", "5", "s", "-1s", "1m", "1.5s", "99999999999999999999s"] {
            assert_eq!(parse_duration_ns(text), None, "{text}");
        }
    }

    #[test]
    fn parameters_are_taken_once_and_the_rest_is_refused() {
        let mut params = Parameters::parse("x:", "a=1&b=%41%2f&&c&fault=1&fault=2").unwrap();
        assert_eq!(params.take("a").unwrap().as_deref(), Some("1"));
        assert_eq!(params.take("b").unwrap().as_deref(), Some("A/"));
        assert!(params.take("fault").unwrap_err().to_string().contains("more than once"));
        assert_eq!(params.take("absent").unwrap(), None);
        let error = params.finish("").unwrap_err().to_string();
        assert!(
            error.contains("\"x:\": unknown parameter \"c\"; known here: a, b, fault"),
            "{error}"
        );
        assert_eq!(params.take_switch("c").unwrap(), Some(true));
        assert!(params.finish("").is_ok());
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
