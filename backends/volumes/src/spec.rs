//! The syntax of volumes, and how they are opened.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sheave_core::{Error, Result, Volume, parse_count, parse_digits};
use sheave_layers::{BlockSize, FaultRule, Faults, Limits, RateLimit, RateLimits, ReadOnly};
use sheave_object::StoredVolume;

use crate::parse::Parameters;
use crate::schemes::nbd::NbdServer;
use crate::source::{self, Source, Trust};

/// Parameters that any volume takes.
pub(crate) const LAYER_PARAMETERS: [&str; 5] =
    ["read-only", "limit-bps", "limit-iops", "fault", "fault-seed"];

/// A VOLUME, parsed: a URL or a bare path.
///
/// `docs/volumes.md` has all schemes and parameters; `schemes/` has a file for each scheme. For an
/// argument that is no text see [`crate::volume_text`].
///
/// The order of the layers, outermost first: read-only, faults, rate limit, block size. So a
/// refused write consumes no fault, a failed op counts against no limit, and faults and limits see
/// ops as the client sent them.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// As written.
    text: String,
    source: Arc<dyn Source>,
    layers: Layers,
}

/// The layers of a text.
#[derive(Clone, Debug)]
struct Layers {
    read_only: bool,
    limits: RateLimits,
    faults: Vec<FaultRule>,
    fault_seed: u64,
}

/// Options of a caller, besides those of the text.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Refuse to write, whatever the text says.
    pub read_only: bool,
    /// Limits that the caller can change while the volume is in use, through a clone. They hold
    /// beside those of the text.
    pub limits: Option<Arc<Limits>>,
    /// How long ops wait for an unreachable server before they fail, unless the text says it; by
    /// default for ever.
    pub away_max: Option<Duration>,
    /// Connections to a server that allows several, unless the text says it; by default 1.
    pub connections: Option<usize>,
    /// Open an object volume although another node has it open, which then cannot write to it any
    /// more.
    pub take_over: bool,
}

/// Parses and opens a VOLUME.
///
/// # Errors
/// See [`VolumeSpec::from_str`] and [`VolumeSpec::open`].
pub fn open(volume: &str, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
    volume.parse::<VolumeSpec>()?.open(options)
}

impl FromStr for VolumeSpec {
    type Err = Error;

    /// Parses a text, parts of which another party may have written. It must not start a program;
    /// for texts that may, see [`VolumeSpec::of_operator`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](sheave_core::ErrorKind::Invalid) if the text is no volume,
    /// [`ErrorKind::Unsupported`](sheave_core::ErrorKind::Unsupported) for a volume that cannot be
    /// opened here, [`ErrorKind::Permission`](sheave_core::ErrorKind::Permission) for one that
    /// starts a program.
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(Trust::Request, text)
    }
}

impl VolumeSpec {
    /// Parses a text that the operator of this node has written: on a command line or in a
    /// configuration file, from where it may have come to this program's own records. It may start
    /// programs (`nbd+exec:`).
    ///
    /// # Errors
    /// As for [`VolumeSpec::from_str`].
    pub fn of_operator(text: &str) -> Result<Self> {
        Self::parse(Trust::Operator, text)
    }

    fn parse(trust: Trust, text: &str) -> Result<Self> {
        let (location, query) = text.split_once('?').unwrap_or((text, ""));
        let mut parameters = Parameters::parse(location, query)?;
        let source = source::parse(trust, text, location, &mut parameters)?;
        let layers = Layers::take(&mut parameters)?;
        parameters.finish()?;
        Ok(Self { text: text.to_owned(), source, layers })
    }

    /// The present [`sheave_core::VolumeInfo::identity`] of the volume.
    ///
    /// # Errors
    /// When the volume does not exist.
    pub fn identity(&self) -> Result<Option<String>> {
        self.source.identity()
    }

    /// Makes a volume that no other program has open `size` bytes long, if a size is given, and
    /// returns its size in bytes. It only grows; new bytes read as zeroes.
    ///
    /// # Errors
    /// Those of [`VolumeSpec::open`] and of [`Volume::extend`].
    pub fn resize(&self, size: Option<u64>) -> Result<u64> {
        if let Some(volume) = self.object_volume()? {
            return size.map_or_else(|| volume.size(), |size| volume.resize(size));
        }
        let options = OpenOptions { read_only: size.is_none(), ..OpenOptions::default() };
        let volume = self.open(&options)?;
        match size {
            Some(size) => volume.extend(size).and_then(|()| volume.grow()),
            None => Ok(volume.size()),
        }
    }

    /// The name of the volume: the [`crate::export_name`] of its file, else its kind.
    #[must_use]
    pub fn name(&self) -> String {
        self.source.name()
    }

    /// The file that it names, if it is one.
    #[must_use]
    pub fn file_path(&self) -> Option<&Path> {
        self.source.file_path()
    }

    /// The same volume in another file, if it is kept in a file.
    #[must_use]
    pub fn with_file_path(mut self, path: PathBuf) -> Self {
        if let Some(source) = self.source.with_file_path(path) {
            self.source = source;
        }
        self
    }

    /// Whether it has parameters.
    #[must_use]
    pub fn has_parameters(&self) -> bool {
        self.text.contains('?')
    }

    /// Whether both are the same data, as far as is known without opening them: one file or device
    /// under any names, or one export.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        self.source.place().is_some_and(|place| Some(place) == other.source.place())
    }

    /// The VOLUME text by which a process in another directory finds the same volume.
    ///
    /// # Errors
    /// When it has a relative path, and the working directory is gone.
    pub fn absolute(&self) -> Result<String> {
        let (location, query) = self.text.split_at(self.text.find('?').unwrap_or(self.text.len()));
        self.source.absolute(location, query)
    }

    /// The NBD server that it is an export of, if it is one; its program is started. The layers are
    /// left out.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn nbd_server(&self) -> Result<Option<NbdServer>> {
        self.source.server().transpose()
    }

    /// The object volume that it is, if it is one, without its layers.
    ///
    /// # Errors
    /// When this node has no directory for its journal.
    pub fn object_volume(&self) -> Result<Option<StoredVolume>> {
        self.source.object_volume().transpose()
    }

    /// Its size in bytes, if its text states that, as of a volume in memory.
    #[must_use]
    pub fn stated_size(&self) -> Option<u64> {
        self.source.stated_size()
    }

    /// The memory that it takes when it is full, in bytes, unless its text allows overcommitment.
    #[must_use]
    pub fn memory_wanted(&self) -> Option<u64> {
        self.source.memory_wanted()
    }

    /// Opens it. May wait for disks and for the network.
    ///
    /// # Errors
    /// Errors of opening the file, making the memory volume or reaching the server.
    pub fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        let read_only = self.layers.read_only || options.read_only;
        let volume = self.source.open(&OpenOptions { read_only, ..options.clone() })?;
        Ok(self.layers.around(volume, read_only, options.limits.clone()))
    }
}

impl Layers {
    fn take(parameters: &mut Parameters) -> Result<Self> {
        let faults = parameters.take_all("fault")?;
        Ok(Self {
            read_only: parameters.take_switch("read-only")?.unwrap_or(false),
            limits: limits(parameters)?,
            faults: faults.iter().map(|rule| rule.parse()).collect::<Result<_>>()?,
            fault_seed: match parameters.take("fault-seed")? {
                None => 0,
                Some(seed) => parse_digits(&seed)
                    .ok_or_else(|| parameters.wrong("fault-seed must be a whole number"))?,
            },
        })
    }

    /// Puts the layers around a volume; `shared` limits hold beside those of the text.
    fn around(
        &self,
        mut volume: Arc<dyn Volume>,
        read_only: bool,
        shared: Option<Arc<Limits>>,
    ) -> Arc<dyn Volume> {
        if volume.info().block.minimum > 1 {
            volume = Arc::new(BlockSize::new(volume));
        }
        let own =
            (self.limits != RateLimits::default()).then(|| Arc::new(Limits::new(self.limits)));
        for limits in own.into_iter().chain(shared) {
            volume = Arc::new(RateLimit::new(volume, limits));
        }
        if !self.faults.is_empty() {
            volume = Arc::new(Faults::new(volume, self.faults.clone(), self.fault_seed));
        }
        if read_only {
            volume = Arc::new(ReadOnly::new(volume));
        }
        volume
    }
}

fn limits(parameters: &mut Parameters) -> Result<RateLimits> {
    let mut limits = RateLimits::default();
    if let Some(bytes) = parameters.take_bytes("limit-bps")? {
        if bytes == 0 {
            return Err(parameters.wrong("limit-bps must be above 0"));
        }
        limits.bytes_per_second = bytes;
    }
    if let Some(text) = parameters.take("limit-iops")? {
        limits.ops_per_second = parse_count("limit-iops", &text)?;
    }
    Ok(limits)
}
