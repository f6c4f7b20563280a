//! How volumes are written down, and how they are opened.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result, Volume, parse_count, parse_digits, parse_size};
use sheave_layers::{BlockSize, FaultRule, Faults, Limits, RateLimit, RateLimits, ReadOnly};
use sheave_local::{FileOptions, FileVolume, Memory, Null};

use crate::names::export_name;
use crate::parse::{Parameters, invalid, percent_decode_bytes};

/// The largest volume: offsets in files are signed.
const SIZE_MAX: u64 = i64::MAX as u64;
/// Schemes of volumes that exist, but not in this crate.
const REMOTE_SCHEMES: [&str; 4] = ["nbd", "nbds", "nbd+unix", "nbds+unix"];
/// Schemes of volumes that do not exist yet.
const OBJECT_SCHEMES: [&str; 2] = ["s3", "dir"];

/// Parameters that any volume takes.
const LAYER_PARAMETERS: [&str; 5] = ["read-only", "limit-bps", "limit-iops", "fault", "fault-seed"];

/// A VOLUME, parsed: a URL or a bare path.
///
/// | text | volume |
/// |---|---|
/// | `memory:?size=1G` | in memory, sparse |
/// | `null:?size=1T` | reads zeroes, discards writes |
/// | `file:///images/a.img`, `/images/a.img`, `a.img` | an image file or block device |
///
/// A bare path is taken as it is written, up to the first `?`; in a URL, `%E9` escapes are undone,
/// so that a URL can name any file. For what is no text see [`crate::volume_text`].
/// Parameters follow after `?`, joined by `&`:
///
/// | parameter | volume | meaning |
/// |---|---|---|
/// | `size=10G` | memory, null | its size |
/// | `overcommit=true` | memory | it may be larger than the memory of its node |
/// | `direct=true` | file | bypass the page cache (`O_DIRECT`) |
/// | `block=4096` | file | logical block of the disk: 512 (default of images), 1024, 2048, 4096 |
/// | `format=raw` | file | serve it as it is, even if it looks like another format |
/// | `lock=false` | file | open it even if another program has it open for writing |
/// | `read-only=true` | all | refuse to write |
/// | `limit-bps=100M`, `limit-iops=5000` | all | per second, of all connections together |
/// | `fault=RULE` (repeatable), `fault-seed=N` | all | failures on purpose, see [`FaultRule`] |
///
/// The layers lie in this order, outermost first: read-only, faults, rate limit, block size. So a
/// refused write consumes no fault, a failed op counts against no limit, and faults and limits see
/// ops as the client sent them.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeSpec {
    source: Source,
    read_only: bool,
    limits: RateLimits,
    faults: Vec<FaultRule>,
    fault_seed: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Source {
    Memory { size: u64, overcommit: bool },
    Null { size: u64 },
    File { path: PathBuf, direct: bool, lock: bool, block: Option<u32>, raw: bool },
}

/// What a caller wants of a volume besides what its text says.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Refuse to write, whatever the text says.
    pub read_only: bool,
    /// Limits that the holder of a clone can change while the volume is in use. They hold beside
    /// those of the text.
    pub limits: Option<Arc<Limits>>,
}

/// Parses and opens a VOLUME.
///
/// # Errors
/// See [`VolumeSpec::from_str`] and [`VolumeSpec::open`].
pub fn open(volume: &str, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
    volume.parse::<VolumeSpec>()?.open(options)
}

/// The [`VolumeInfo::identity`] of what has this name now.
///
/// # Errors
/// When nothing has.
pub fn identity(volume: &str) -> Result<Option<String>> {
    match volume.parse::<VolumeSpec>()?.source {
        Source::File { path, .. } => sheave_local::file_identity(&path),
        Source::Memory { .. } | Source::Null { .. } => Ok(None),
    }
}

/// Makes a VOLUME that no other program has open `size` bytes long, if a size is given, and returns
/// its size in bytes. It only grows; what is new reads as zeroes.
///
/// # Errors
/// Those of [`open`] and of [`Volume::extend`].
pub fn resize(volume: &str, size: Option<u64>) -> Result<u64> {
    let options = OpenOptions { read_only: size.is_none(), ..OpenOptions::default() };
    let volume = open(volume, &options)?;
    match size {
        Some(size) => volume.extend(size).and_then(|()| volume.grow()),
        None => Ok(volume.size()),
    }
}

impl FromStr for VolumeSpec {
    type Err = Error;

    /// # Errors
    /// [`ErrorKind::Invalid`] for what is no volume, [`ErrorKind::Unsupported`] for a volume that
    /// cannot be opened here.
    fn from_str(text: &str) -> Result<Self> {
        let (location, query) = text.split_once('?').unwrap_or((text, ""));
        let mut parameters = Parameters::parse(location, query)?;
        let source = match split_scheme(location) {
            Some(("memory", rest)) => Source::Memory {
                size: size_of(rest, &mut parameters)?,
                overcommit: parameters.take_switch("overcommit")?.unwrap_or(false),
            },
            Some(("null", rest)) => Source::Null { size: size_of(rest, &mut parameters)? },
            Some(("file", rest)) => file_source(url_path(location, rest)?, &mut parameters)?,
            Some((scheme, _)) => return Err(foreign(scheme, text)),
            None if location.is_empty() => {
                return Err(invalid("parse volume", format!("\"{text}\": the path is missing")));
            }
            None => file_source(PathBuf::from(location), &mut parameters)?,
        };
        let spec = Self {
            source,
            read_only: parameters.take_switch("read-only")?.unwrap_or(false),
            limits: limits(&mut parameters)?,
            faults: parameters
                .take_all("fault")
                .iter()
                .map(|rule| rule.parse())
                .collect::<Result<_>>()?,
            fault_seed: match parameters.take("fault-seed")? {
                None => 0,
                Some(seed) => parse_digits(&seed)
                    .ok_or_else(|| parameters.wrong("fault-seed must be a whole number"))?,
            },
        };
        parameters.finish(match spec.source {
            Source::File { .. } => "; a file name with '?' in it is written file:///…%3F…",
            Source::Memory { .. } | Source::Null { .. } => "",
        })?;
        Ok(spec)
    }
}

impl VolumeSpec {
    /// What to call the volume: the [`export_name`] of its file, else its kind.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.source {
            Source::Memory { .. } => "memory".to_owned(),
            Source::Null { .. } => "null".to_owned(),
            Source::File { path, .. } => {
                path.file_name().map_or_else(|| "file".to_owned(), export_name)
            }
        }
    }

    /// The file that it names, if it is one.
    #[must_use]
    pub fn file_path(&self) -> Option<&Path> {
        match &self.source {
            Source::File { path, .. } => Some(path),
            Source::Memory { .. } | Source::Null { .. } => None,
        }
    }

    /// The same volume, kept in another file, if it is kept in one.
    #[must_use]
    pub fn with_file_path(mut self, other: PathBuf) -> Self {
        if let Source::File { path, .. } = &mut self.source {
            *path = other;
        }
        self
    }

    /// The memory that it takes when it is full, in bytes, unless its text says that it may be more
    /// than there is.
    #[must_use]
    pub fn memory_wanted(&self) -> Option<u64> {
        match self.source {
            Source::Memory { size, overcommit: false } => Some(size),
            _ => None,
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// What opening the file or making the memory volume says.
    pub fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        let read_only = self.read_only || options.read_only;
        let mut volume: Arc<dyn Volume> = match &self.source {
            Source::Memory { size, .. } => Arc::new(Memory::new(*size)?),
            Source::Null { size } => Arc::new(Null::new(*size)),
            Source::File { path, direct, lock, block, raw } => {
                let (direct, lock, block, raw) = (*direct, *lock, *block, *raw);
                let path = path.clone();
                let options = FileOptions { path, read_only, direct, lock, block, raw };
                Arc::new(FileVolume::open(&options)?)
            }
        };
        if volume.info().block.minimum > 1 {
            volume = Arc::new(BlockSize::new(volume));
        }
        let own =
            (self.limits != RateLimits::default()).then(|| Arc::new(Limits::new(self.limits)));
        for limits in own.into_iter().chain(options.limits.clone()) {
            volume = Arc::new(RateLimit::new(volume, limits));
        }
        if !self.faults.is_empty() {
            volume = Arc::new(Faults::new(volume, self.faults.clone(), self.fault_seed));
        }
        if read_only {
            volume = Arc::new(ReadOnly::new(volume));
        }
        Ok(volume)
    }
}

/// Splits `scheme:rest`. A colon after a slash, or after what can't be a scheme, is part of a path.
pub(crate) fn split_scheme(location: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = location.split_once(':')?;
    let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    is_scheme.then_some((scheme, rest))
}

/// The path of a file URL. Not normalized: `..` behind a symbolic link is the kernel's business.
fn url_path(location: &str, rest: &str) -> Result<PathBuf> {
    let path = match rest.strip_prefix("//") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => rest,
    };
    if !path.starts_with('/') || path.starts_with("//") {
        let why =
            format!("{location}: a file URL is file:// and an absolute path, file:///images/a.img");
        return Err(invalid("parse volume", why));
    }
    Ok(PathBuf::from(OsStr::from_bytes(&percent_decode_bytes(path)?)))
}

fn file_source(path: PathBuf, parameters: &mut Parameters) -> Result<Source> {
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(parameters.wrong("no file name holds a zero byte"));
    }
    Ok(Source::File {
        path,
        direct: parameters.take_switch("direct")?.unwrap_or(false),
        lock: parameters.take_switch("lock")?.unwrap_or(true),
        block: logical_block(parameters)?,
        raw: is_raw(parameters)?,
    })
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

fn size_of(rest: &str, parameters: &mut Parameters) -> Result<u64> {
    if !rest.is_empty() {
        return Err(parameters.wrong("nothing may stand before ?size="));
    }
    let Some(text) = parameters.take("size")? else {
        // It may be there, misspelt.
        parameters.refuse_all_but(&LAYER_PARAMETERS, "")?;
        return Err(parameters.wrong("the size is missing; add ?size=1G"));
    };
    match parse_size(&text)? {
        size if size > SIZE_MAX => Err(parameters.wrong(&format!("size={text}: the most is 8E-1"))),
        size => Ok(size),
    }
}

fn limits(parameters: &mut Parameters) -> Result<RateLimits> {
    let mut limits = RateLimits::default();
    if let Some(text) = parameters.take("limit-bps")? {
        limits.bytes_per_second = parse_size(&text)?;
        if limits.bytes_per_second == 0 {
            return Err(parameters.wrong("limit-bps must be above 0"));
        }
    }
    if let Some(text) = parameters.take("limit-iops")? {
        limits.ops_per_second = parse_count("limit-iops", &text)?;
    }
    Ok(limits)
}

fn foreign(scheme: &str, text: &str) -> Error {
    let (kind, why) = if REMOTE_SCHEMES.contains(&scheme) {
        (ErrorKind::Unsupported, "a remote export can only be copied from and to in this version")
    } else if OBJECT_SCHEMES.contains(&scheme) {
        (ErrorKind::Unsupported, "object volumes do not exist in this version")
    } else {
        let known =
            "unknown scheme; known: memory, null, file. For a path with a colon put ./ in front";
        (ErrorKind::Invalid, known)
    };
    Error::new(kind, "parse volume", format!("{text}: {why}"))
}
