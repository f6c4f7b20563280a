//! NBD URIs ("uri.md" of the NBD project), with the additions of libnbd.
//!
//! ```text
//! nbd[s]://[user@]host[:port]/export        nbd[s]+unix:///export?socket=PATH
//! nbd[s]+vsock://cid[:port]/export
//! ```

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use sheave_core::{percent_decode, percent_encode};

use crate::bytes::as_string;
use crate::wire::PORT;

/// The longest URI in bytes.
pub const URI_LEN_MAX: usize = 64 << 10;

/// The address of an export, and how to connect to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// The connection must be encrypted, or fail.
    pub tls: bool,
    /// The server.
    pub transport: Transport,
    /// Name of the user for TLS with a pre-shared key.
    pub user: Option<String>,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// How TLS authenticates.
    pub tls_options: TlsOptions,
    /// All other query parameters, in order. The specification wants unknown ones to be reported,
    /// except those that begin with `x-`; only the caller knows which ones it knows.
    pub parameters: Vec<(String, String)>,
}

/// A server's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// A unix socket; a path that begins with NUL is an abstract name.
    Unix {
        /// Path.
        path: PathBuf,
    },
    /// A virtual machine's socket.
    Vsock {
        /// Context id.
        cid: u32,
        /// Port.
        port: u32,
    },
}

/// TLS parameters of a URI.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// `tls-type`
    pub kind: Option<TlsKind>,
    /// `tls-hostname`: the name to expect in the server's certificate.
    pub hostname: Option<String>,
    /// `tls-verify-peer`
    pub verify_peer: Option<bool>,
    /// `tls-certificates`: a directory of certificates.
    pub certificates: Option<PathBuf>,
    /// `tls-psk-file`: a file of pre-shared keys.
    pub psk_file: Option<PathBuf>,
}

/// Ways to authenticate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsKind {
    /// Not at all.
    Anon,
    /// Certificates.
    X509,
    /// Pre-shared keys.
    Psk,
}

/// Why a URI was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// [`URI_LEN_MAX`]
    #[error("a URI of more than {URI_LEN_MAX} bytes")]
    TooLong,
    /// Not one of ours.
    #[error("the scheme is none of nbd, nbds, nbd+unix, nbds+unix, nbd+vsock, nbds+vsock")]
    Scheme,
    /// A percent sign without two hexadecimal digits after it.
    #[error("a bad percent escape in {0:?}")]
    Escape(String),
    /// Not text, where text must be.
    #[error("{0} is not UTF-8, has a NUL, or is longer than 4096 bytes")]
    Text(&'static str),
    /// Host or port.
    #[error("a bad host or port: {0:?}")]
    Authority(String),
    /// `socket` is missing, or there where it does not belong.
    #[error("{0}")]
    Socket(&'static str),
    /// A parameter with a value that it cannot have, or twice.
    #[error("a bad value of the parameter {0}")]
    Parameter(&'static str),
    /// The specification has no fragments.
    #[error("a fragment (#); write it as %23")]
    Fragment,
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        if uri.len() > URI_LEN_MAX {
            return Err(UriError::TooLong);
        }
        if uri.contains('#') {
            return Err(UriError::Fragment);
        }
        let (scheme, rest) = uri.split_once(':').ok_or(UriError::Scheme)?;
        let scheme = scheme.to_ascii_lowercase();
        let (scheme, family) = scheme.split_once('+').unwrap_or((&scheme, "tcp"));
        let tls = match scheme {
            "nbd" => false,
            "nbds" => true,
            _ => return Err(UriError::Scheme),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.find('/').map_or((rest, ""), |at| rest.split_at(at)),
            None => ("", rest),
        };
        let export = decode(path.strip_prefix('/').unwrap_or(path))?;
        let export = text(export, "the export's name")?;
        let mut parameters = Parameters::parse(query)?;
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(text(decode(user)?, "the user's name")?), address),
            None => (None, authority),
        };
        let transport = match (family, parameters.take_path("socket")?) {
            ("tcp", None) => parse_tcp(address)?,
            ("vsock", None) => parse_vsock(address)?,
            ("unix", Some(path)) if address.is_empty() => Transport::Unix { path },
            ("unix", Some(_)) => return Err(UriError::Authority(address.to_owned())),
            ("unix", None) => {
                return Err(UriError::Socket("the parameter socket is missing; add ?socket=PATH"));
            }
            ("tcp" | "vsock", Some(_)) => {
                return Err(UriError::Socket("only nbd+unix has the parameter socket"));
            }
            _ => return Err(UriError::Scheme),
        };
        let tls_options = TlsOptions::take(&mut parameters)?;
        Ok(Self { tls, transport, user, export, tls_options, parameters: parameters.0 })
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "nbds" } else { "nbd" };
        let user = self.user.as_ref().map(|user| escape(user.as_bytes()) + "@");
        let user = user.unwrap_or_default();
        match &self.transport {
            Transport::Tcp { host, port } => {
                let host = match host.contains(':') {
                    true => format!("[{host}]"),
                    false => escape(host.as_bytes()),
                };
                write!(f, "{scheme}://{user}{host}")?;
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
            }
            Transport::Unix { .. } => write!(f, "{scheme}+unix://{user}")?,
            Transport::Vsock { cid, port } => {
                write!(f, "{scheme}+vsock://{user}{cid}")?;
                if *port != u32::from(PORT) {
                    write!(f, ":{port}")?;
                }
            }
        }
        write!(f, "/{}", escape(self.export.as_bytes()))?;
        for (index, (key, value)) in self.query().enumerate() {
            let before = if index == 0 { '?' } else { '&' };
            write!(f, "{before}{}={}", escape(key.as_bytes()), escape(&value))?;
        }
        Ok(())
    }
}

impl NbdUri {
    /// Query parameters that were not taken and that are not experimental, for the error message of
    /// a caller that knows no others.
    pub fn unknown_parameters(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|(key, _)| key.as_str()).filter(|key| !key.starts_with("x-"))
    }

    /// All query parameters, unescaped.
    fn query(&self) -> impl Iterator<Item = (&str, Cow<'_, [u8]>)> {
        let socket = match &self.transport {
            Transport::Unix { path } => Some(("socket", path.as_os_str().as_bytes().into())),
            Transport::Tcp { .. } | Transport::Vsock { .. } => None,
        };
        let rest = self.parameters.iter();
        let rest = rest.map(|(key, value)| (key.as_str(), value.as_bytes().into()));
        socket.into_iter().chain(self.tls_options.query()).chain(rest)
    }
}

impl TlsOptions {
    fn take(parameters: &mut Parameters) -> Result<Self, UriError> {
        let kind = match parameters.take_text("tls-type")?.as_deref() {
            None => None,
            Some("anon") => Some(TlsKind::Anon),
            Some("x509") => Some(TlsKind::X509),
            Some("psk") => Some(TlsKind::Psk),
            Some(_) => return Err(UriError::Parameter("tls-type")),
        };
        let verify_peer = match parameters.take_text("tls-verify-peer")?.as_deref() {
            None => None,
            Some("0" | "false") => Some(false),
            Some("1" | "true") => Some(true),
            Some(_) => return Err(UriError::Parameter("tls-verify-peer")),
        };
        Ok(Self {
            kind,
            hostname: parameters.take_text("tls-hostname")?,
            verify_peer,
            certificates: parameters.take_path("tls-certificates")?,
            psk_file: parameters.take_path("tls-psk-file")?,
        })
    }

    fn query(&self) -> impl Iterator<Item = (&str, Cow<'_, [u8]>)> {
        let kind = self.kind.map(|kind| match kind {
            TlsKind::Anon => "anon",
            TlsKind::X509 => "x509",
            TlsKind::Psk => "psk",
        });
        let verify_peer = self.verify_peer.map(|verify| if verify { "1" } else { "0" });
        let path_bytes = |path: &'_ PathBuf| path.as_os_str().as_bytes().to_vec();
        [
            ("tls-type", kind.map(|kind| kind.as_bytes().into())),
            ("tls-hostname", self.hostname.as_ref().map(|name| name.as_bytes().into())),
            ("tls-verify-peer", verify_peer.map(|verify| verify.as_bytes().into())),
            ("tls-certificates", self.certificates.as_ref().map(|path| path_bytes(path).into())),
            ("tls-psk-file", self.psk_file.as_ref().map(|path| path_bytes(path).into())),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
    }
}

/// Query parameters that have not been taken yet.
struct Parameters(Vec<(String, String)>);

impl Parameters {
    fn parse(query: &str) -> Result<Self, UriError> {
        let mut parameters = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = text(decode(key)?, "a parameter's name")?;
            // Paths are bytes; they stay escaped until it is known what is a path.
            decode(value)?;
            parameters.push((key, value.to_owned()));
        }
        let mut all = Self(parameters);
        all.unescape_others()?;
        Ok(all)
    }

    /// Unescapes the values that are text.
    fn unescape_others(&mut self) -> Result<(), UriError> {
        for (key, value) in &mut self.0 {
            if !PATHS.contains(&key.as_str()) {
                let bytes = decode(value)?;
                *value = String::from_utf8(bytes).map_err(|_| UriError::Text("a parameter"))?;
            }
        }
        Ok(())
    }

    fn take_text(&mut self, key: &'static str) -> Result<Option<String>, UriError> {
        let mut values = self.0.extract_if(.., |(known, _)| known == key);
        let first = values.next();
        if values.next().is_some() {
            return Err(UriError::Parameter(key));
        }
        Ok(first.map(|(_, value)| value))
    }

    fn take_path(&mut self, key: &'static str) -> Result<Option<PathBuf>, UriError> {
        debug_assert!(PATHS.contains(&key), "its value is still escaped");
        let Some(value) = self.take_text(key)? else {
            return Ok(None);
        };
        match decode(&value)? {
            path if path.is_empty() => Err(UriError::Parameter(key)),
            path => Ok(Some(PathBuf::from(OsString::from_vec(path)))),
        }
    }
}

/// Parameters whose values are paths.
const PATHS: [&str; 3] = ["socket", "tls-certificates", "tls-psk-file"];

fn parse_tcp(address: &str) -> Result<Transport, UriError> {
    let bad = || UriError::Authority(address.to_owned());
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(bad)?;
            let port = match port.strip_prefix(':') {
                Some(port) => port,
                None if port.is_empty() => port,
                None => return Err(bad()),
            };
            if !host.contains(':') {
                return Err(bad());
            }
            (host.to_owned(), port)
        }
        None => {
            let (host, port) = address.split_once(':').unwrap_or((address, ""));
            if port.contains(':') {
                return Err(bad());
            }
            (text(decode(host)?, "the host")?, port)
        }
    };
    let is_bracketed = address.starts_with('[');
    let has_odd_byte = host.bytes().any(|byte| b"[]/@".contains(&byte) || byte <= b' ');
    if has_odd_byte || host.contains(':') != is_bracketed {
        return Err(bad());
    }
    let host = if host.is_empty() { "localhost".to_owned() } else { host };
    let port = if port.is_empty() { PORT } else { parse_number(port).ok_or_else(bad)? };
    Ok(Transport::Tcp { host, port })
}

fn parse_vsock(address: &str) -> Result<Transport, UriError> {
    let bad = || UriError::Authority(address.to_owned());
    let (cid, port) = address.split_once(':').unwrap_or((address, ""));
    let cid = parse_number(cid).ok_or_else(bad)?;
    let port = if port.is_empty() { PORT.into() } else { parse_number(port).ok_or_else(bad)? };
    Ok(Transport::Vsock { cid, port })
}

/// Digits only: unlike `str::parse`, no sign.
fn parse_number<T: FromStr>(digits: &str) -> Option<T> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn text(bytes: Vec<u8>, what: &'static str) -> Result<String, UriError> {
    as_string(&bytes).map(str::to_owned).ok_or(UriError::Text(what))
}

/// Undoes percent escapes.
fn decode(escaped: &str) -> Result<Vec<u8>, UriError> {
    let bytes = percent_decode(escaped).ok_or_else(|| UriError::Escape(escaped.to_owned()))?;
    Ok(bytes.into_owned())
}

/// Escapes all but what is harmless everywhere in a URI.
fn escape(bytes: &[u8]) -> String {
    percent_encode(bytes, |c| c.is_ascii_alphanumeric() || "-._~/".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(uri: &str) -> Result<NbdUri, UriError> {
        uri.parse()
    }

    #[test]
    fn uri_examples_of_the_specification() {
        let name = |uri| parse(uri).map(|uri| uri.export);
        assert_eq!(name("nbd://example.com/disk").unwrap(), "disk");
        assert_eq!(name("nbd+unix:///disk?socket=sock").unwrap(), "disk");
        assert_eq!(name("nbd://example.com/").unwrap(), "");
        assert_eq!(name("nbd://example.com").unwrap(), "");
        assert_eq!(name("nbd://example.com//disk").unwrap(), "/disk");
        assert_eq!(name("nbd://example.com/hello%20world").unwrap(), "hello world");
        let uri = parse("nbd+unix:///?socket=%00/abstract").unwrap();
        assert_eq!(uri.transport, Transport::Unix { path: PathBuf::from("\0/abstract") });
    }

    #[test]
    fn uri_addresses() {
        let tcp = |host: &str, port| Ok(Transport::Tcp { host: host.to_owned(), port });
        let transport = |uri| parse(uri).map(|uri| uri.transport);
        assert_eq!(transport("nbd://h"), tcp("h", 10809));
        assert_eq!(transport("NBD://h:1/x"), tcp("h", 1));
        assert_eq!(transport("nbd:///x"), tcp("localhost", 10809));
        assert_eq!(transport("nbd://u@[::1]:7"), tcp("::1", 7));
        assert_eq!(transport("nbd+vsock://2:9"), Ok(Transport::Vsock { cid: 2, port: 9 }));
        for bad in
            ["nbd://h:65536", "nbd://h:+1", "nbd://a%3Ab", "nbd://a:b:1", "nbd://[::1", "nbd://[h]"]
        {
            assert!(matches!(parse(bad), Err(UriError::Authority(_))), "{bad}");
        }
    }

    #[test]
    fn uri_tls() {
        let uri = parse(
            "nbds+unix://alice@/e?socket=/s%20s&tls-type=psk&tls-psk-file=/k&tls-verify-peer=0\
             &tls-hostname=h&tls-certificates=/c&connections=4&x-trial=1",
        );
        let uri = uri.unwrap();
        assert!(uri.tls);
        assert_eq!(uri.user.as_deref(), Some("alice"));
        assert_eq!(uri.tls_options.kind, Some(TlsKind::Psk));
        assert_eq!(uri.tls_options.psk_file, Some(PathBuf::from("/k")));
        assert_eq!(uri.tls_options.verify_peer, Some(false));
        assert_eq!(uri.unknown_parameters().collect::<Vec<_>>(), ["connections"]);
        assert_eq!(parse(&uri.to_string()).unwrap(), uri);
    }

    #[test]
    fn uri_mistakes_are_diagnosed() {
        assert_eq!(parse("http://h"), Err(UriError::Scheme));
        assert_eq!(parse("nbd+tls://h"), Err(UriError::Scheme));
        assert_eq!(parse("/a/path"), Err(UriError::Scheme));
        assert!(matches!(parse("nbd+unix:///e"), Err(UriError::Socket(_))));
        assert!(matches!(parse("nbd://h/?socket=/s"), Err(UriError::Socket(_))));
        assert!(matches!(parse("nbd+unix://h/?socket=/s"), Err(UriError::Authority(_))));
        assert_eq!(parse("nbd+unix:///?socket="), Err(UriError::Parameter("socket")));
        let twice = parse("nbd+unix:///?socket=a&socket=b");
        assert_eq!(twice, Err(UriError::Parameter("socket")));
        assert_eq!(parse("nbd://h/?tls-type=magic"), Err(UriError::Parameter("tls-type")));
        assert!(matches!(parse("nbd://h/%zz"), Err(UriError::Escape(_))));
        assert!(matches!(parse("nbd://h/%"), Err(UriError::Escape(_))));
        assert!(matches!(parse("nbd://h/%00"), Err(UriError::Text(_))));
        assert!(matches!(parse("nbd://h/%ff"), Err(UriError::Text(_))));
        assert_eq!(parse("nbd://h/a#b"), Err(UriError::Fragment));
    }
}
