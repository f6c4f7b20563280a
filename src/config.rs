//! Configuration files, in TOML: that of the daemon, documented in docs/daemon.md, and shared code.

mod pools;
pub(crate) mod serve;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sheave_core::printable;
use sheave_pools::PoolConfig;
use toml::{Spanned, Value};

use pools::PoolKeys;

/// The default file, read if it exists.
pub(crate) const DEFAULT_PATH: &str = "/etc/sheave/daemon.toml";

/// The most characters of a message that come from the file: it may be any file, such as an image.
const SHOWN_MAX: usize = 400;

/// The valid values of keys and options.
pub(crate) const SHARDS: RangeInclusive<i64> = 1..=64;
pub(crate) const POLL_US: RangeInclusive<i64> = 0..=10_000;
/// The default.
pub(crate) const POLL_US_DEFAULT: u32 = 50;

/// The contents of a configuration file. The command line has precedence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DaemonConfig {
    pub(crate) shards: Option<u32>,
    pub(crate) poll_us: Option<u32>,
    pub(crate) metrics: Option<String>,
    /// By name.
    pub(crate) pools: Vec<PoolConfig>,
}

/// The error of a configuration that cannot be used, in one line. It must be corrected before
/// another try.
#[derive(Debug)]
pub(crate) struct BadConfig(String);

impl DaemonConfig {
    /// Reads the named file, else the default one, if it exists.
    ///
    /// # Errors
    /// When it cannot be read, or has unknown keys or invalid values.
    pub(crate) fn load(named: Option<&Path>) -> Result<Self, BadConfig> {
        let path = named.unwrap_or_else(|| Path::new(DEFAULT_PATH));
        match fs::read_to_string(path) {
            Ok(text) => File { path, text: &text }.config(),
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(error) => Err(BadConfig::unreadable(path, &error)),
        }
    }
}

/// The keys as they are written, so that errors can name their line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    shards: Option<Spanned<Value>>,
    poll_us: Option<Spanned<Value>>,
    metrics: Option<Spanned<Value>>,
    #[serde(default)]
    pools: BTreeMap<Spanned<String>, PoolKeys>,
}

pub(crate) struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn config(&self) -> Result<DaemonConfig, BadConfig> {
        let keys: Keys = self.keys()?;
        Ok(DaemonConfig {
            shards: self.number(keys.shards, SHARDS)?,
            poll_us: self.number(keys.poll_us, POLL_US)?,
            metrics: self.text(keys.metrics)?,
            pools: self.pools(keys.pools)?,
        })
    }

    fn keys<T: DeserializeOwned>(&self) -> Result<T, BadConfig> {
        toml::from_str(self.text)
            .map_err(|error| self.bad(error.span().unwrap_or_default(), plain(error.message())))
    }

    fn number(
        &self,
        value: Option<Spanned<Value>>,
        range: RangeInclusive<i64>,
    ) -> Result<Option<u32>, BadConfig> {
        let (least, most) = range.clone().into_inner();
        self.value(value, &format!("expected a number from {least} to {most}"), |value| {
            let number = value.as_integer().filter(|number| range.contains(number));
            number.and_then(|number| u32::try_from(number).ok())
        })
    }

    /// The result of `take` for a value; `None` is an error that says what is `expected`.
    fn value<T>(
        &self,
        value: Option<Spanned<Value>>,
        expected: &str,
        take: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, BadConfig> {
        let Some(value) = value else { return Ok(None) };
        match take(value.get_ref()) {
            Some(taken) => Ok(Some(taken)),
            None => Err(self.bad(value.span(), expected)),
        }
    }

    /// Names the position and shows the line, which has the key.
    fn bad(&self, span: Range<usize>, why: &str) -> BadConfig {
        let index = self.line_of(&span);
        let line = shown(self.text.lines().nth(index).unwrap_or_default().trim());
        let why = shown(&why.lines().collect::<Vec<_>>().join(", "));
        BadConfig(format!("{}:{}: {line}: {why}", printable(&self.path), index + 1))
    }

    /// The line of a position, from 0.
    fn line_of(&self, span: &Range<usize>) -> usize {
        self.text.get(..span.start).unwrap_or(self.text).matches('\n').count()
    }
}

/// The parser's message, with advice where it is not enough.
fn plain(message: &str) -> &str {
    match message {
        "invalid type: map, expected a sequence" => {
            "each of several tables has two brackets on either side; write [[export]]"
        }
        _ if message.contains("leading zero") => {
            "a number does not begin with 0; permission bits are written in quotes"
        }
        _ => message,
    }
}

/// A text of the file as a part of a line: no control characters, and not longer than
/// [`SHOWN_MAX`].
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_MAX + 1).collect();
    shown = printable(&shown).to_string();
    if let Some((end, _)) = shown.char_indices().nth(SHOWN_MAX) {
        shown.truncate(end);
        shown.push('…');
    }
    shown
}

impl BadConfig {
    /// An error without a position.
    pub(crate) fn new(text: String) -> Self {
        Self(text)
    }

    /// An error of the file as a whole.
    fn unreadable(path: &Path, error: &io::Error) -> Self {
        Self(format!("cannot read the configuration file {}: {error}", printable(&path)))
    }
}

impl fmt::Display for BadConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for BadConfig {}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../deploy/daemon.toml");

    fn parse(text: &str) -> Result<DaemonConfig, String> {
        File { path: Path::new("f.toml"), text }.config().map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_read_and_all_may_be_left_out() {
        let full = parse("# fast\nshards = 2\npoll_us = 0\n").unwrap();
        assert_eq!(full, DaemonConfig { shards: Some(2), poll_us: Some(0), ..Default::default() });
        assert_eq!(parse("").unwrap(), DaemonConfig::default());
        let metrics = parse("metrics = \"127.0.0.1:3\"").unwrap().metrics;
        assert_eq!(metrics.as_deref(), Some("127.0.0.1:3"));
        assert_eq!(parse("shards = 64\npoll_us = 10_000").unwrap().poll_us, Some(10_000));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place_and_what_would_be_right() {
        let wrong = [
            ("shards = 0", "f.toml:1: shards = 0: expected a number from 1 to 64"),
            ("\n shards=65 # all", "f.toml:2: shards=65 # all: expected a number from 1 to 64"),
            ("poll_us = -1", "f.toml:1: poll_us = -1: expected a number from 0 to 10000"),
            ("poll_us = \"50\"", "f.toml:1: poll_us = \"50\": expected a number from 0 to 10000"),
            (
                "poll_us = 1\nshard = 2\n",
                "f.toml:2: shard = 2: unknown field `shard`, expected one of `shards`, \
                 `poll_us`, `metrics`, `pools`",
            ),
        ];
        for (text, said) in wrong {
            assert_eq!(parse(text).unwrap_err(), said);
        }
        for (text, place) in [
            ("shards 2", "f.toml:1: shards 2: "),
            ("shards = 2\nshards = 3", "f.toml:2: shards = 3: "),
            ("[shards]\nx = 1", "f.toml:1: [shards]: "),
            ("poll_us = 1\n[daemon]\n", "f.toml:2: [daemon]: "),
            ("shards = 99999999999999999999", "f.toml:1: shards = 99999999999999999999: "),
            ("shards = [\n", "f.toml:1: "),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.starts_with(place) && !said.contains('\n'), "{said}");
            assert!(said.len() > place.len() + 3, "{said}");
        }
    }

    #[test]
    fn a_file_that_is_something_else_is_refused_in_a_short_line() {
        let long = "b".repeat(2 << 20);
        for text in ["\0".repeat(2 << 20), format!("a = \"{long}"), format!("{long} = 1")] {
            let said = parse(&text).unwrap_err();
            assert!(said.starts_with("f.toml:1: ") && said.len() < 3 * SHOWN_MAX, "{said}");
            assert!(!said.contains('\0'), "{said}");
        }
    }

    #[test]
    fn a_file_that_is_named_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no.toml");
        let said = DaemonConfig::load(Some(&missing)).unwrap_err().to_string();
        assert!(said.contains("no.toml: No such file"), "{said}");
        assert!(DaemonConfig::load(Some(dir.path())).is_err());
    }

    #[test]
    fn the_example_has_all_keys_and_is_good_with_and_without_them() {
        assert_eq!(parse(EXAMPLE).unwrap(), DaemonConfig::default());
        // Comments have a space behind their #, and keys have none.
        let key = |line: &'static str| line.strip_prefix('#').filter(|key| !key.starts_with(' '));
        let keys: Vec<_> = EXAMPLE.lines().filter_map(key).collect();
        let DaemonConfig { shards, poll_us, metrics, pools } = parse(&keys.join("\n")).unwrap();
        assert!(shards.is_some() && poll_us.is_some() && metrics.is_some(), "{keys:?}");
        assert!(pools.iter().any(|pool| pool.capacity.is_some() && pool.default_size.is_some()));
    }
}
