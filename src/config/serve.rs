//! The configuration file of `sheave serve`, documented in docs/serve.md.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;
use sheave_core::parse_size;
use sheave_core::printable;
use sheave_layers::RateLimits;
use sheave_nbd::{Access, STRING_LEN_MAX};
use sheave_shard::EngineChoice;
use sheave_volumes::VolumeSpec;
use toml::{Spanned, Value};

use super::{BadConfig, File, POLL_US, SHARDS};
use crate::serve::prepare::Wanted;

const CONNECTIONS_MAX: std::ops::RangeInclusive<i64> = 1..=16_384;

/// The contents of a configuration file. The command line has precedence.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServeConfig {
    pub(crate) listen: Vec<String>,
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) socket_mode: Option<u32>,
    pub(crate) socket_group: Option<String>,
    pub(crate) tls_cert: Option<PathBuf>,
    pub(crate) tls_key: Option<PathBuf>,
    pub(crate) tls_client_ca: Option<PathBuf>,
    pub(crate) tls_client_crl: Option<PathBuf>,
    pub(crate) shards: Option<u32>,
    pub(crate) poll_us: Option<u32>,
    pub(crate) metrics: Option<String>,
    pub(crate) engine: Option<EngineArg>,
    /// Each `[[export]]`.
    pub(crate) exports: Vec<Wanted>,
}

/// How connections are run, on the command line and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineArg {
    /// io_uring where the kernel has it, else threads
    Auto,
    /// io_uring or fail
    Uring,
    /// A thread a connection
    Threads,
}

impl From<EngineArg> for EngineChoice {
    fn from(arg: EngineArg) -> Self {
        match arg {
            EngineArg::Auto => Self::Auto,
            EngineArg::Uring => Self::Uring,
            EngineArg::Threads => Self::Threads,
        }
    }
}

/// The keys as they are written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    listen: Option<Spanned<Value>>,
    socket: Option<Spanned<Value>>,
    socket_mode: Option<Spanned<Value>>,
    socket_group: Option<Spanned<Value>>,
    tls_cert: Option<Spanned<Value>>,
    tls_key: Option<Spanned<Value>>,
    tls_client_ca: Option<Spanned<Value>>,
    tls_client_crl: Option<Spanned<Value>>,
    shards: Option<Spanned<Value>>,
    poll_us: Option<Spanned<Value>>,
    metrics: Option<Spanned<Value>>,
    engine: Option<Spanned<Value>>,
    #[serde(default)]
    export: Vec<Spanned<ExportKeys>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportKeys {
    name: Option<Spanned<Value>>,
    volume: Option<Spanned<Value>>,
    description: Option<Spanned<Value>>,
    read_only: Option<Spanned<Value>>,
    limit_bps: Option<Spanned<Value>>,
    limit_iops: Option<Spanned<Value>>,
    clients: Option<Spanned<Value>>,
    addresses: Option<Spanned<Value>>,
    connections_max: Option<Spanned<Value>>,
}

impl ServeConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, or has unknown keys or invalid values.
    pub(crate) fn load(path: &Path) -> Result<Self, BadConfig> {
        let text = fs::read_to_string(path).map_err(|error| BadConfig::unreadable(path, &error))?;
        File { path, text: &text }.serve_config()
    }
}

impl File<'_> {
    fn serve_config(&self) -> Result<ServeConfig, BadConfig> {
        let keys: Keys = self.keys()?;
        let exports = keys.export.into_iter().map(|export| self.export(export));
        let mode = "expected permission bits in octal, in quotes, such as \"0660\"";
        let engine = "expected \"auto\", \"uring\" or \"threads\"";
        Ok(ServeConfig {
            listen: self.texts(keys.listen)?,
            sockets: self.texts(keys.socket)?.into_iter().map(PathBuf::from).collect(),
            socket_mode: self.value(keys.socket_mode, mode, |value| {
                value.as_str().and_then(|text| parse_mode(text).ok())
            })?,
            socket_group: self.text(keys.socket_group)?,
            tls_cert: self.text(keys.tls_cert)?.map(PathBuf::from),
            tls_key: self.text(keys.tls_key)?.map(PathBuf::from),
            tls_client_ca: self.text(keys.tls_client_ca)?.map(PathBuf::from),
            tls_client_crl: self.text(keys.tls_client_crl)?.map(PathBuf::from),
            shards: self.number(keys.shards, SHARDS)?,
            poll_us: self.number(keys.poll_us, POLL_US)?,
            metrics: self.text(keys.metrics)?,
            engine: self.value(keys.engine, engine, |value| {
                value.as_str().and_then(|text| EngineArg::from_str(text, false).ok())
            })?,
            exports: exports.collect::<Result<_, _>>()?,
        })
    }

    fn export(&self, keys: Spanned<ExportKeys>) -> Result<Wanted, BadConfig> {
        let span = keys.span();
        let keys = keys.into_inner();
        let Some(volume) = keys.volume else {
            return Err(self.bad(span, "the volume is missing; add volume = \"/images/a.img\""));
        };
        let at = volume.span();
        let volume = self.text(Some(volume))?.unwrap_or_default();
        let spec = VolumeSpec::of_operator(&volume)
            .map_err(|error| self.bad(at.clone(), &error.to_string()))?;
        let name_at = keys.name.as_ref().map_or(at, Spanned::span);
        let name = self.text(keys.name)?.unwrap_or_else(|| spec.name());
        check_text("name", &name).map_err(|why| self.bad(name_at, &why))?;
        let description_at = keys.description.as_ref().map_or(0..0, Spanned::span);
        let description = self.text(keys.description)?.unwrap_or_default();
        check_text("description", &description).map_err(|why| self.bad(description_at, &why))?;
        let connections_max = self.number(keys.connections_max, CONNECTIONS_MAX)?;
        let switch = "expected true or false";
        Ok(Wanted {
            place: format!("{}:{}", printable(&self.path), self.line_of(&span) + 1),
            name,
            volume,
            spec,
            description,
            read_only: self.value(keys.read_only, switch, Value::as_bool)?.unwrap_or(false),
            take_over: false,
            limits: Some(RateLimits {
                bytes_per_second: self.rate(keys.limit_bps)?,
                ops_per_second: self.rate(keys.limit_iops)?,
            }),
            access: Access {
                names: self.parsed(keys.clients)?,
                peers: self.parsed(keys.addresses)?,
            },
            connections_max: connections_max.and_then(|max| usize::try_from(max).ok()),
        })
    }

    pub(super) fn text(&self, value: Option<Spanned<Value>>) -> Result<Option<String>, BadConfig> {
        self.value(value, "expected a text in quotes", |value| {
            value.as_str().filter(|text| !text.contains('\0')).map(str::to_owned)
        })
    }

    /// One or several.
    fn texts(&self, value: Option<Spanned<Value>>) -> Result<Vec<String>, BadConfig> {
        let expected = "expected a text in quotes, or a list of them: [\"…\", \"…\"]";
        let taken = self.value(value, expected, |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(all) => all.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
            _ => None,
        })?;
        Ok(taken.unwrap_or_default())
    }

    /// A list that, if given, has an entry: an empty one could mean all or none.
    fn parsed<T: std::str::FromStr<Err = &'static str>>(
        &self,
        value: Option<Spanned<Value>>,
    ) -> Result<Vec<T>, BadConfig> {
        let Some(value) = value else { return Ok(Vec::new()) };
        let span = value.span();
        let texts = self.texts(Some(value))?;
        if texts.is_empty() {
            return Err(self.bad(span, "expected at least one; leave it out to allow all"));
        }
        let parse = |text: &String| {
            text.parse().map_err(|why| self.bad(span.clone(), &format!("{text:?}: {why}")))
        };
        texts.iter().map(parse).collect()
    }

    /// 0 without one.
    fn rate(&self, value: Option<Spanned<Value>>) -> Result<u64, BadConfig> {
        let expected = "expected a rate a second above 0: a number, or a text such as \"100M\"";
        let rate = self.value(value, expected, |value| {
            let rate = match value {
                Value::Integer(number) => u64::try_from(*number).ok(),
                Value::String(text) => parse_size(text).ok(),
                _ => None,
            };
            rate.filter(|&rate| rate > 0)
        })?;
        Ok(rate.unwrap_or(0))
    }
}

/// Checks a string that goes to clients.
///
/// # Errors
/// Says what is wrong with it.
pub(crate) fn check_text(what: &str, text: &str) -> Result<(), String> {
    let len = text.len();
    if len > STRING_LEN_MAX {
        return Err(format!("the {what} has {len} bytes; NBD has at most {STRING_LEN_MAX}"));
    }
    Ok(())
}

/// Permission bits in octal.
///
/// # Errors
/// Describes the valid form.
pub(crate) fn parse_mode(text: &str) -> Result<u32, &'static str> {
    let is_octal = text.len() <= 4 && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| is_octal && *mode <= 0o777);
    mode.ok_or("expected permission bits in octal, such as 0660")
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../deploy/serve.toml");

    fn parse(text: &str) -> Result<ServeConfig, String> {
        File { path: Path::new("f.toml"), text }.serve_config().map_err(|error| error.to_string())
    }

    #[test]
    fn all_keys_are_read_and_all_but_a_volume_may_be_left_out() {
        let full = parse(
            "listen = [\"127.0.0.1:1\", \"[::1]:2\"]\nsocket = \"/s\"\nsocket_mode = \"0660\"\n\
             socket_group = \"disk\"\ntls_cert = \"c\"\ntls_key = \"k\"\ntls_client_ca = \"a\"\n\
             tls_client_crl = \"r\"\nshards = 2\npoll_us = 0\nmetrics = \"127.0.0.1:3\"\n\
             engine = \"threads\"\n[[export]]\nname = \"a\"\nvolume = \"memory:?size=1M\"\n\
             description = \"b\"\nread_only = true\nlimit_bps = \"1M\"\nlimit_iops = 5\n\
             clients = [\"c\", \"*.d\"]\naddresses = [\"10.0.0.0/8\", \"unix\"]\n\
             connections_max = 7\n[[export]]\nvolume = \"/images/x.img\"\n",
        )
        .unwrap();
        assert_eq!(full.listen, ["127.0.0.1:1", "[::1]:2"]);
        assert_eq!((full.sockets, full.socket_mode), (vec!["/s".into()], Some(0o660)));
        assert_eq!((full.shards, full.poll_us), (Some(2), Some(0)));
        let [one, two] = &full.exports[..] else { panic!("{:?}", full.exports) };
        assert_eq!((one.name.as_str(), one.place.as_str()), ("a", "f.toml:13"));
        let limits = RateLimits { bytes_per_second: 1 << 20, ops_per_second: 5 };
        assert_eq!((one.limits, one.connections_max), (Some(limits), Some(7)));
        assert_eq!((one.access.names.len(), one.access.peers.len()), (2, 2));
        assert!(one.read_only && !two.read_only);
        assert_eq!((two.name.as_str(), two.description.as_str()), ("x.img", ""));
        assert_eq!(two.access, Access::default());
        assert!(parse("").unwrap().exports.is_empty());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place_and_what_would_be_right() {
        let long = "n".repeat(4097);
        let export = |line: &str| format!("[[export]]\nvolume = \"memory:?size=1M\"\n{line}\n");
        let wrong = [
            (
                "socket_mode = \"0999\"".to_owned(),
                "f.toml:1: socket_mode = \"0999\": expected perm",
            ),
            ("socket_mode = 660".to_owned(), "f.toml:1: socket_mode = 660: expected permission"),
            ("engine = \"fast\"".to_owned(), "f.toml:1: engine = \"fast\": expected \"auto\""),
            ("listen = [1]".to_owned(), "f.toml:1: listen = [1]: expected a text in quotes, or"),
            ("shards = 65".to_owned(), "f.toml:1: shards = 65: expected a number from 1 to 64"),
            (
                "[[export]]\nname = \"a\"\n".to_owned(),
                "f.toml:1: [[export]]: the volume is missing",
            ),
            ("socket_mode = 0660".to_owned(), "f.toml:1: socket_mode = 0660: a number does not"),
            ("[export]\nvolume = \"a\"".to_owned(), "f.toml:1: [export]: each of several tables"),
            ("[[exports]]".to_owned(), "f.toml:1: [[exports]]: unknown field `exports`"),
            (export("limit = 5"), "f.toml:3: limit = 5: unknown field `limit`, expected one of"),
            (export("clients = []"), "f.toml:3: clients = []: expected at least one"),
            (export("clients = \"a*\""), "f.toml:3: clients = \"a*\": \"a*\": expected a name"),
            (
                export("addresses = [\"10/8\"]"),
                "f.toml:3: addresses = [\"10/8\"]: \"10/8\": expected",
            ),
            (export("limit_bps = 0"), "f.toml:3: limit_bps = 0: expected a rate"),
            (export("limit_iops = \"many\""), "f.toml:3: limit_iops = \"many\": expected a rate"),
            (export("connections_max = 0"), "f.toml:3: connections_max = 0: expected a number"),
            (
                export("read_only = \"yes\""),
                "f.toml:3: read_only = \"yes\": expected true or false",
            ),
            ("[[export]]\nvolume = \"s3://x\"".to_owned(), "f.toml:2: volume = \"s3://x\": parse"),
            (export("name = \"a\\u0000\""), "f.toml:3: name = \"a\\u0000\": expected a text"),
        ];
        for (text, said) in wrong {
            let error = parse(&text).unwrap_err();
            assert!(error.starts_with(said) && !error.contains('\n'), "{said}\n{error}");
        }
        let error = parse(&export(&format!("name = \"{long}\""))).unwrap_err();
        assert!(error.ends_with("the name has 4097 bytes; NBD has at most 4096"), "{error}");
    }

    #[test]
    fn the_example_has_every_key() {
        parse(EXAMPLE).unwrap();
        let uncommented: String = EXAMPLE
            .lines()
            .map(|line| {
                line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)
            })
            .fold(String::new(), |all, line| all + line + "\n");
        let all = parse(&uncommented).unwrap();
        for key in [
            "listen",
            "socket",
            "socket_mode",
            "socket_group",
            "tls_cert",
            "tls_key",
            "tls_client_ca",
            "tls_client_crl",
            "shards",
            "poll_us",
            "metrics",
            "engine",
            "name",
            "volume",
            "description",
            "read_only",
            "limit_bps",
            "limit_iops",
            "clients",
            "addresses",
            "connections_max",
        ] {
            let has = |line: &str| line.starts_with(&format!("{key} = "));
            assert!(uncommented.lines().any(has), "{key}");
        }
        assert_eq!(all.exports.len(), 2);
    }
}
