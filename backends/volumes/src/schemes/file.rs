//! `file:///images/a.img`, `/images/a.img`, `a.img`: an image file or a block device.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{self, Path, PathBuf};
use std::sync::Arc;

use sheave_core::{Error, Result, Volume, is_plain, parse_size};
use sheave_local::{FileOptions, FileVolume, file_identity};

use crate::names::{export_name, path_text};
use crate::parse::{Parameters, invalid, percent_decode_bytes};
use crate::source::{Scheme, Source, Url};
use crate::spec::OpenOptions;

pub(crate) const SCHEME: Scheme = Scheme { names: &["file"], starts_program: false, parse };

/// For unknown parameters.
const HINT: &str = "; a file name with '?' in it is written file:///…%3F…";

#[derive(Clone, Debug)]
struct File {
    /// `read_only` comes from the opener.
    options: FileOptions,
}

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    let Some(path) = url_path(url.rest)? else {
        let location = url.location;
        let why =
            format!("{location}: a file URL is file:// and an absolute path, file:///images/a.img");
        return Err(invalid("parse volume", why));
    };
    file(path, parameters)
}

/// A bare path, taken literally.
pub(crate) fn parse_path(path: &str, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    file(PathBuf::from(path), parameters)
}

/// The path of a file URL, if it is absolute. Not normalized: only the kernel can resolve `..`
/// behind a symbolic link.
pub(super) fn url_path(rest: &str) -> Result<Option<PathBuf>> {
    let path = match rest.strip_prefix("//") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => rest,
    };
    if !path.starts_with('/') || path.starts_with("//") {
        return Ok(None);
    }
    Ok(Some(PathBuf::from(OsStr::from_bytes(&percent_decode_bytes(path)?))))
}

fn file(path: PathBuf, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(parameters.wrong("no file name holds a zero byte"));
    }
    parameters.set_hint(HINT);
    let options = FileOptions {
        path,
        read_only: false,
        direct: parameters.take_switch("direct")?.unwrap_or(false),
        lock: parameters.take_switch("lock")?.unwrap_or(true),
        block: logical_block(parameters)?,
        raw: is_raw(parameters)?,
    };
    Ok(Arc::new(File { options }))
}

fn logical_block(parameters: &mut Parameters) -> Result<Option<u32>> {
    let Some(text) = parameters.take("block")? else { return Ok(None) };
    match parse_size(&text)? {
        size @ (512 | 1024 | 2048 | 4096) => Ok(Some(size as u32)),
        _ => Err(parameters.wrong(&format!("block={text}: write 512, 1024, 2048 or 4096"))),
    }
}

fn is_raw(parameters: &mut Parameters) -> Result<bool> {
    match parameters.take("format")?.as_deref() {
        None => Ok(false),
        Some("raw") => Ok(true),
        Some(other) => {
            let why = format!("format={other}: only raw images are served; qemu-nbd serves others");
            Err(parameters.wrong(&why))
        }
    }
}

impl Source for File {
    fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        let options = FileOptions { read_only: options.read_only, ..self.options.clone() };
        Ok(Arc::new(FileVolume::open(&options)?))
    }

    fn name(&self) -> String {
        self.options.path.file_name().map_or_else(|| "file".to_owned(), export_name)
    }

    fn identity(&self) -> Result<Option<String>> {
        file_identity(&self.options.path)
    }

    fn place(&self) -> Option<String> {
        let found = fs::metadata(&self.options.path).ok()?;
        Some(match found.file_type().is_block_device() {
            true => format!("device {}", found.rdev()),
            false => format!("file {} on {}", found.ino(), found.dev()),
        })
    }

    /// A path becomes absolute, and a URL if it is no printable text, or holds a `?`. A URL stays
    /// as it is, unless its path has such bytes: their escapes can be written in several ways, and
    /// a volume has one name.
    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        let path = &self.options.path;
        let is_url = path != Path::new(location);
        if is_url && path.to_str().is_some_and(|path| path.chars().all(is_plain)) {
            return Ok(format!("{location}{query}"));
        }
        let whole = path::absolute(path)
            .map_err(|error| Error::from_io("parse volume", "working directory", error))?;
        Ok(path_text(&whole) + query)
    }

    fn file_path(&self) -> Option<&Path> {
        Some(&self.options.path)
    }

    fn with_file_path(&self, path: PathBuf) -> Option<Arc<dyn Source>> {
        Some(Arc::new(Self { options: FileOptions { path, ..self.options.clone() } }))
    }
}
