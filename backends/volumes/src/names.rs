//! File names, which are bytes, as text: VOLUME arguments, `file:` URLs and export names.

use std::env;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use sheave_core::{Error, Result, is_plain, percent_encode};

use crate::parse::percent_decode_bytes;
use crate::source::split_scheme;

/// The VOLUME text of a command-line argument, which may hold any byte but zero.
///
/// Printable text stays as it is. Otherwise a bare path becomes an absolute [`file_url`], and the
/// odd bytes of a URL and of parameters become `%E9` escapes in their places. So logs, records and
/// requests to the daemon contain printable text only, whatever the file's name.
///
/// # Errors
/// When the path is relative and the working directory is gone.
pub fn volume_text(argument: &OsStr) -> Result<String> {
    if let Some(text) = argument.to_str().filter(|text| text.chars().all(is_plain)) {
        return Ok(text.to_owned());
    }
    let bytes = argument.as_bytes();
    let end = bytes.iter().position(|&byte| byte == b'?').unwrap_or(bytes.len());
    let (location, query) = bytes.split_at(end);
    // A scheme is ASCII, so undecodable bytes follow it.
    let is_url = split_scheme(&String::from_utf8_lossy(location)).is_some();
    if is_url || location.is_empty() {
        return Ok(percent_encode(bytes, is_plain));
    }
    let path = Path::new(OsStr::from_bytes(location));
    let directory = match path.is_absolute() {
        true => Default::default(),
        false => working_directory()?,
    };
    Ok(file_url(&directory.join(path)) + &percent_encode(query, is_plain))
}

/// Makes the paths of some parameters absolute. `query` begins with its `?`, or is empty.
pub(crate) fn absolute_paths(query: &str, names: &[&str]) -> Result<String> {
    let Some(pairs) = query.strip_prefix('?') else { return Ok(query.to_owned()) };
    let pairs = pairs.split('&').map(|pair| match pair.split_once('=') {
        Some((name, value)) if names.contains(&name) => {
            let bytes = percent_decode_bytes(value)?;
            let path = Path::new(OsStr::from_bytes(&bytes));
            // An abstract socket's name begins with a zero byte.
            if path.is_absolute() || bytes.first().is_none_or(|first| *first == 0) {
                return Ok(pair.to_owned());
            }
            let path = working_directory()?.join(path);
            Ok(format!("{name}={}", parameter_value(path.as_os_str())))
        }
        _ => Ok(pair.to_owned()),
    });
    Ok(format!("?{}", pairs.collect::<Result<Vec<_>>>()?.join("&")))
}

/// Escapes characters that have a meaning in a parameter's value.
#[must_use]
pub fn parameter_value(value: &OsStr) -> String {
    percent_encode(value.as_bytes(), |c| {
        is_plain(c) && !char::is_whitespace(c) && !"%?#&+".contains(c)
    })
}

/// The directory that relative paths are in.
///
/// # Errors
/// When it is gone.
pub(crate) fn working_directory() -> Result<PathBuf> {
    env::current_dir().map_err(|error| Error::from_io("parse volume", "working directory", error))
}

/// The VOLUME text of an absolute path: the path itself if that is printable text which begins no
/// parameters, else its [`file_url`].
#[must_use]
pub fn path_text(path: &Path) -> String {
    match path.to_str() {
        Some(text) if text.chars().all(|c| is_plain(c) && c != '?') => text.to_owned(),
        _ => file_url(path),
    }
}

/// The `file:///` URL of an absolute path. Parsing it as a VOLUME gives the path back, byte by
/// byte.
#[must_use]
pub fn file_url(path: &Path) -> String {
    let is_kept = |c| is_plain(c) && !char::is_whitespace(c) && !"%?#".contains(c);
    let escaped = percent_encode(path.as_os_str().as_bytes(), is_kept);
    // In a URL a second slash would begin a host's name.
    match escaped.strip_prefix("//") {
        Some(rest) => format!("file:///%2F{rest}"),
        None => format!("file://{escaped}"),
    }
}

/// The export name of a file name. NBD names are printable UTF-8 (proto.md, "String values");
/// other bytes are written as `%E9`, and then `%` itself as `%25`.
///
/// Names of different files are different: a name that contains something like an escape is escaped
/// too.
#[must_use]
pub fn export_name(file_name: &OsStr) -> String {
    let is_kept = |c| is_plain(c) && c != '%';
    match file_name.to_str() {
        Some(text) if text.chars().all(is_plain) && !has_escape(text) => text.to_owned(),
        _ => percent_encode(file_name.as_bytes(), is_kept),
    }
}

fn has_escape(text: &str) -> bool {
    let is_escape = |bytes: &[u8]| {
        bytes[0] == b'%' && bytes[1].is_ascii_hexdigit() && bytes[2].is_ascii_hexdigit()
    };
    text.as_bytes().windows(3).any(is_escape)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::VolumeSpec;

    fn os(bytes: &[u8]) -> &OsStr {
        OsStr::from_bytes(bytes)
    }

    fn path_of(text: &str) -> Vec<u8> {
        let spec: VolumeSpec = text.parse().unwrap();
        spec.file_path().unwrap().as_os_str().as_bytes().to_vec()
    }

    #[test]
    fn arguments_become_printable_text() {
        let cases: [(&[u8], &str); 10] = [
            (b"/images/a%20b.img?direct", "/images/a%20b.img?direct"),
            ("caf\u{e9}.img".as_bytes(), "caf\u{e9}.img"),
            (b"/caf\xe9 %3f.img", "file:///caf%E9%20%253f.img"),
            (b"/caf\xe9.img?read-only", "file:///caf%E9.img?read-only"),
            (b"//a\n", "file:///%2Fa%0A"),
            (b"/a\x1b[2J", "file:///a%1B[2J"),
            (b"file:///caf\xe9%20.img?lock=\xff", "file:///caf%E9%20.img?lock=%FF"),
            (b"nbd+unix:///?socket=/caf\xe9", "nbd+unix:///?socket=/caf%E9"),
            (b"memory:?size=\x01", "memory:?size=%01"),
            (b"?\xff", "?%FF"),
        ];
        for (argument, want) in cases {
            assert_eq!(volume_text(os(argument)).unwrap(), want);
        }
        let here = file_url(&env::current_dir().unwrap());
        assert_eq!(volume_text(os(b"./caf\xe9:1")).unwrap(), format!("{here}/./caf%E9:1"));
    }

    #[test]
    fn a_question_mark_in_a_path_is_kept_by_a_url() {
        assert_eq!(path_text(Path::new("/what/a.img")), "/what/a.img");
        assert_eq!(path_text(Path::new("/what?/a%.img")), "file:///what%3F/a%25.img");
        assert_eq!(path_of("file:///what%3F/a%25.img"), b"/what?/a%.img");
    }

    #[test]
    fn export_names_are_printable_and_different() {
        let cases: [(&[u8], &str); 6] = [
            (b"a b.img", "a b.img"),
            (b"100%.img", "100%.img"),
            (b"caf\xe9.img", "caf%E9.img"),
            (b"caf%E9.img", "caf%25E9.img"),
            (b"caf%\xe9.img", "caf%25%E9.img"),
            (b"a\nb", "a%0Ab"),
        ];
        for (name, want) in cases {
            assert_eq!(export_name(os(name)), want);
        }
    }

    /// Bytes of which many are special.
    fn path_bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![1..=255_u8, prop::sample::select(b"/%?#&.:e9\xe9\n".to_vec())];
        prop::collection::vec(byte, 0..40)
    }

    proptest! {
        #[test]
        fn a_path_survives_its_url_and_a_url_its_path(mut path in path_bytes()) {
            path.insert(0, b'/');
            let url = file_url(Path::new(os(&path)));
            prop_assert!(url.chars().all(is_plain), "{url}");
            prop_assert_eq!(&path_of(&url), &path);
            prop_assert_eq!(file_url(Path::new(os(&path_of(&url)))), url);
            prop_assert_eq!(path_of(&path_text(Path::new(os(&path)))), path);
        }

        #[test]
        fn an_argument_names_the_file_that_it_spells(mut path in path_bytes()) {
            path.insert(0, b'/');
            path.retain(|byte| *byte != b'?');
            let text = volume_text(os(&path)).unwrap();
            prop_assert!(text.chars().all(is_plain), "{text}");
            prop_assert_eq!(path_of(&text), path);
            prop_assert_eq!(volume_text(os(text.as_bytes())).unwrap(), text);
        }

        #[test]
        fn different_files_have_different_export_names(a in path_bytes(), b in path_bytes()) {
            let (a, b) = (os(&a), os(&b));
            prop_assert_eq!(a == b, export_name(a) == export_name(b));
        }

        #[test]
        fn an_export_name_tells_the_file_name(name in path_bytes()) {
            let shown = export_name(os(&name));
            prop_assert!(shown.chars().all(is_plain), "{shown}");
            let told = percent_decode_bytes(&shown);
            let is_escaped = shown.as_bytes() != name;
            prop_assert!(!is_escaped || *told.unwrap() == name);
        }
    }
}
