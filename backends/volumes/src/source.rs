//! Schemes: the interface, and the list of all.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result, Volume};
use sheave_object::StoredVolume;

use crate::parse::{Parameters, invalid};
use crate::schemes::nbd::NbdServer;
use crate::schemes::{dir, exec, file, memory, nbd, null, s3};
use crate::spec::OpenOptions;

/// All schemes. To add one, add a file in `schemes/` and a line here.
const SCHEMES: [&Scheme; 7] = [
    &memory::SCHEME,
    &null::SCHEME,
    &file::SCHEME,
    &nbd::SCHEME,
    &exec::SCHEME,
    &dir::SCHEME,
    &s3::SCHEME,
];

/// A kind of volume, by the name before the colon of its URL.
pub(crate) struct Scheme {
    /// Its names.
    pub(crate) names: &'static [&'static str],
    /// Whether opening one starts a program that its text names.
    pub(crate) starts_program: bool,
    /// Parses a URL of it, and takes the parameters of the scheme.
    pub(crate) parse: fn(&Url<'_>, &mut Parameters) -> Result<Arc<dyn Source>>,
}

/// A VOLUME text in its parts: `scheme:rest?query`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Url<'a> {
    /// The whole text.
    pub(crate) text: &'a str,
    /// The part before the `?`.
    pub(crate) location: &'a str,
    /// The part between the first colon and the `?`.
    pub(crate) rest: &'a str,
}

/// The trust in a VOLUME text, by its author.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// A command line or a configuration file of this node, or a record of such a volume.
    Operator,
    /// A request, whose text another party may have written.
    Request,
}

/// The volume that a VOLUME text names, without its layers.
pub(crate) trait Source: fmt::Debug + Send + Sync {
    /// Opens it, without layers. May wait for disks and for the network.
    fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>>;

    /// The default name of its export.
    fn name(&self) -> String;

    /// See [`crate::VolumeSpec::identity`].
    fn identity(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// The place of its data, if two texts can mean the same data.
    fn place(&self) -> Option<String> {
        None
    }

    /// See [`crate::VolumeSpec::absolute`]; `query` is what follows the location, with its `?`.
    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        Ok(format!("{location}{query}"))
    }

    /// The NBD server that has it; a program is started if it names one.
    fn server(&self) -> Option<Result<NbdServer>> {
        None
    }

    /// The file that it is kept in.
    fn file_path(&self) -> Option<&Path> {
        None
    }

    /// The same volume in another file, if it is kept in a file.
    fn with_file_path(&self, _: PathBuf) -> Option<Arc<dyn Source>> {
        None
    }

    /// The object volume that it is.
    fn object_volume(&self) -> Option<Result<StoredVolume>> {
        None
    }

    /// Its size in bytes, where its text states that.
    fn stated_size(&self) -> Option<u64> {
        None
    }

    /// The memory that it takes when it is full, in bytes, unless its text allows overcommitment.
    fn memory_wanted(&self) -> Option<u64> {
        None
    }
}

/// The parameter that has a program say the key of a volume.
pub(crate) const KEY_COMMAND: &str = "key-command";

/// Finds the scheme of a text and parses the text. Only this function keeps requests from starting
/// programs.
pub(crate) fn parse(
    trust: Trust,
    text: &str,
    location: &str,
    parameters: &mut Parameters,
) -> Result<Arc<dyn Source>> {
    let Some((scheme, rest)) = split_scheme(location) else {
        if location.is_empty() {
            return Err(invalid("parse volume", format!("\"{text}\": the path is missing")));
        }
        return file::parse_path(location, parameters);
    };
    let Some(known) = SCHEMES.iter().find(|known| known.names.contains(&scheme)) else {
        let names = SCHEMES.iter().flat_map(|scheme| scheme.names).copied().collect::<Vec<_>>();
        let why = format!(
            "{text}: unknown scheme; known: {}. For a path with a colon put ./ in front",
            names.join(", ")
        );
        return Err(invalid("parse volume", why));
    };
    let starts_program = known.starts_program || parameters.has(KEY_COMMAND);
    if starts_program && trust != Trust::Operator {
        let why = format!(
            "{scheme}: a volume that starts a program is opened from a command line or a \
             configuration file, and not by a request"
        );
        return Err(Error::new(ErrorKind::Permission, "parse volume", why));
    }
    (known.parse)(&Url { text, location, rest }, parameters)
}

/// Splits `scheme:rest`. A colon after a slash, or after text that cannot be a scheme, is part of a
/// path.
pub(crate) fn split_scheme(location: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = location.split_once(':')?;
    let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    is_scheme.then_some((scheme, rest))
}
