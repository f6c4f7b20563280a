//! The rules of the fault layer and their syntax.

use std::str::FromStr;

use sheave_core::{
    Error, ErrorKind, Nanos, Op, OpKind, Result, parse_count, parse_digits, parse_duration_ns,
    parse_size,
};

/// Longest delay: an hour.
const DELAY_NS_MAX: Nanos = 3_600_000_000_000;

/// The errors that a client can see (NBD proto.md, "Error values").
const ERRORS: [(&str, ErrorKind); 8] = [
    ("EINVAL", ErrorKind::Invalid),
    ("EIO", ErrorKind::Io),
    ("ENOMEM", ErrorKind::NoMemory),
    ("ENOSPC", ErrorKind::NoSpace),
    ("ENOTSUP", ErrorKind::Unsupported),
    ("EOVERFLOW", ErrorKind::TooLarge),
    ("EPERM", ErrorKind::Permission),
    ("ESHUTDOWN", ErrorKind::Shutdown),
];

/// A fault and its conditions. It is written as ops and settings between colons:
///
/// ```text
/// write:error=EIO:after=100
/// read:delay=200ms:probability=0.01
/// write+flush:error=ENOSPC:count=1:range=0-1M
/// any:delay=5ms
/// ```
///
/// First the ops, joined by `+`: `read`, `write`, `flush`, `trim`, `write-zeroes`, `cache`,
/// `block-status`, or `any`. Then at least one of
/// - `error=E…`: the op fails without reaching the volume (`EIO`, `ENOSPC`, `EPERM`, `EINVAL`,
///   `ENOMEM`, `ENOTSUP`, `EOVERFLOW`, `ESHUTDOWN`);
/// - `delay=TIME`: the op waits (`ns`, `us`, `ms`, `s`; at most an hour), then goes on or fails;
///
/// and any of
/// - `after=N`: the first N matching ops are spared;
/// - `count=N`: only N ops are struck;
/// - `probability=P`: of the others each is struck with probability P, from 0 to 1;
/// - `range=FROM-TO`: only ops that touch bytes FROM up to, not including, TO (sizes; TO may be
///   left out). A flush has no range and matches every one.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultRule {
    /// As written, for messages.
    pub(super) text: String,
    /// One bit per [`OpKind`].
    ops: u8,
    pub(super) error: Option<ErrorKind>,
    pub(super) delay_ns: Nanos,
    pub(super) after: u64,
    pub(super) count: u64,
    pub(super) probability: f64,
    from: u64,
    to: u64,
}

impl FromStr for FaultRule {
    type Err = Error;

    /// # Errors
    /// [`ErrorKind::Invalid`] if the text is no such rule.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let mut rule = Self {
            text: text.to_owned(),
            ops: parse_ops(text, parts.next().unwrap_or_default())?,
            error: None,
            delay_ns: 0,
            after: 0,
            count: u64::MAX,
            probability: 1.0,
            from: 0,
            to: u64::MAX,
        };
        for part in parts {
            rule.set(part)?;
        }
        if rule.error.is_none() && rule.delay_ns == 0 {
            return Err(wrong(text, "it does nothing; add error=EIO or delay=200ms"));
        }
        Ok(rule)
    }
}

impl FaultRule {
    /// Whether it matches an op, regardless of counts and probability.
    pub(super) fn matches(&self, op: &Op) -> bool {
        let touches =
            op.range().is_none_or(|range| range.start() < self.to && self.from < range.end());
        self.covers(op.kind()) && touches
    }

    /// Whether it matches ops of this kind.
    pub(super) fn covers(&self, kind: OpKind) -> bool {
        self.ops & bit(kind) != 0
    }

    fn set(&mut self, part: &str) -> Result<()> {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match name {
            "error" => self.error = Some(parse_error(&self.text, value)?),
            "delay" => {
                let delay = parse_duration_ns(value).filter(|ns| (1..=DELAY_NS_MAX).contains(ns));
                let why = "delay must be a time up to an hour, such as 200ms";
                self.delay_ns = delay.ok_or_else(|| wrong(&self.text, why))?;
            }
            "after" => {
                let why = "after must be a whole number";
                self.after = parse_digits(value).ok_or_else(|| wrong(&self.text, why))?;
            }
            "count" => self.count = parse_count("count", value)?,
            "probability" => {
                let chance = value.parse().ok().filter(|chance| (0.0..=1.0).contains(chance));
                let why = "probability must be a number from 0 to 1";
                self.probability = chance.ok_or_else(|| wrong(&self.text, why))?;
            }
            "range" => (self.from, self.to) = parse_range(&self.text, value)?,
            _ => {
                let why = format!(
                    "\"{part}\" is no setting; known: error, delay, after, count, probability, \
                     range"
                );
                return Err(wrong(&self.text, &why));
            }
        }
        Ok(())
    }
}

fn parse_ops(rule: &str, text: &str) -> Result<u8> {
    text.split('+').try_fold(0, |ops, name| {
        let name = name.replace('-', "_");
        if name == "any" {
            return Ok(u8::MAX);
        }
        let known = OpKind::ALL.iter().find(|kind| kind.name() == name);
        let kind = known.ok_or_else(|| {
            let names = OpKind::ALL.map(|kind| kind.name().replace('_', "-")).join(", ");
            wrong(rule, &format!("\"{name}\" is no op; it begins with ops: any, {names}"))
        })?;
        Ok(ops | bit(*kind))
    })
}

fn parse_error(rule: &str, name: &str) -> Result<ErrorKind> {
    let known = ERRORS.iter().find(|(known, _)| name == *known);
    known.map(|(_, kind)| *kind).ok_or_else(|| {
        let names = ERRORS.map(|(name, _)| name).join(", ");
        wrong(rule, &format!("error must be one of {names}"))
    })
}

fn parse_range(rule: &str, text: &str) -> Result<(u64, u64)> {
    let why = "range must be FROM-TO, such as 0-1M or 4G-";
    let (from, to) = text.split_once('-').ok_or_else(|| wrong(rule, why))?;
    let (from, to) = (parse_size(from)?, if to.is_empty() { u64::MAX } else { parse_size(to)? });
    if from >= to {
        return Err(wrong(rule, "range must end after it begins"));
    }
    Ok((from, to))
}

fn bit(kind: OpKind) -> u8 {
    1 << kind as u8
}

fn wrong(rule: &str, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, "parse fault rule", format!("\"{rule}\": {why}"))
}

#[cfg(test)]
mod tests {
    use sheave_core::ByteRange;

    use super::*;

    fn read(start: u64, len: u64) -> Op {
        Op::Read { range: ByteRange::within(start, len, u64::MAX).unwrap(), into: None }
    }

    #[test]
    fn rules_match_ops_and_ranges() {
        let rule: FaultRule = "read+write-zeroes:error=EIO:range=4K-8K".parse().unwrap();
        assert!(rule.matches(&read(0, 4097)));
        assert!(rule.matches(&read(8191, 1)));
        assert!(!rule.matches(&read(0, 4096)));
        assert!(!rule.matches(&read(8192, 1)));
        assert!(!rule.matches(&Op::Flush));
        assert!(rule.covers(OpKind::WriteZeroes) && !rule.covers(OpKind::Write));
        let rule: FaultRule = "any:delay=1ms:range=1M-".parse().unwrap();
        assert!(rule.matches(&Op::Flush) && rule.matches(&read(2 << 20, 1)));
        assert!(!rule.matches(&read(0, 1)));
    }

    #[test]
    fn wrong_rules_say_what_is_wrong() {
        let cases = [
            ("", "is no op"),
            ("write", "does nothing"),
            ("wirte:error=EIO", "\"wirte\" is no op"),
            ("write:error=EFOO", "error must be one of EINVAL"),
            ("write:delay=5", "delay must be a time"),
            ("write:delay=2000000s", "up to an hour"),
            ("write:error=EIO:count=0", "above 0"),
            ("write:error=EIO:after=x", "whole number"),
            ("write:error=EIO:probability=1.1", "from 0 to 1"),
            ("write:error=EIO:probability=NaN", "from 0 to 1"),
            ("write:error=EIO:range=5", "FROM-TO"),
            ("write:error=EIO:range=2M-1M", "end after it begins"),
            ("write:error=EIO:when=now", "\"when=now\" is no setting"),
        ];
        for (text, want) in cases {
            let error = text.parse::<FaultRule>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(want), "{text}: {error}");
        }
    }
}
