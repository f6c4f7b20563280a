//! How sizes, times and counts are written, in volumes, rules and on command lines.

use crate::{Error, ErrorKind, Result};

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
///
/// # Errors
/// [`ErrorKind::Invalid`] when it is none; `name` says in the message which one.
pub fn parse_count(name: &str, text: &str) -> Result<u64> {
    match parse_digits(text) {
        Some(count) if count > 0 => Ok(count),
        _ => Err(invalid("parse", format!("{name}={text}: it must be a whole number above 0"))),
    }
}

/// Parses a time such as `200ms` into nanoseconds: a whole number and `ns`, `us`, `ms` or `s`.
#[must_use]
pub fn parse_duration_ns(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 4] =
        [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];
    let (digits, unit_ns) =
        UNITS.iter().find_map(|(unit, ns)| Some((text.strip_suffix(unit)?, *ns)))?;
    parse_digits(digits)?.checked_mul(unit_ns)
}

/// Parses decimal digits and nothing else, not even a sign.
#[must_use]
pub fn parse_digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn invalid(op: &'static str, context: String) -> Error {
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
}
