//! What the schemes of object volumes have in common.

use std::path::PathBuf;
use std::sync::Arc;

use sheave_core::{Result, Volume};
use sheave_object::format::is_snapshot_name;
use sheave_object::{KeySource, StoredVolume, Tuning, VolumeStore};

use crate::names::absolute_paths;
use crate::parse::Parameters;
use crate::source::{KEY_COMMAND, Source};
use crate::spec::OpenOptions;
use crate::state_dir::state_dir;

/// An object volume in any store.
#[derive(Debug)]
pub(super) struct Objects {
    /// Its name in messages, which no other volume has.
    name: String,
    /// The default name of its export.
    export: String,
    store: Arc<dyn VolumeStore>,
    /// The name of its snapshot, if that is meant.
    snapshot: Option<String>,
    /// Where this node keeps the journal, if the text says it.
    cache_dir: Option<PathBuf>,
    /// Bytes of the read cache there, if the text says it.
    cache_bytes: Option<u64>,
    /// Where its key is, if it is encrypted.
    key: Option<KeySource>,
}

/// Splits `place@snapshot`. A place with an @ in its last part is written with %40.
pub(super) fn split_snapshot<'a>(
    text: &'a str,
    parameters: &Parameters,
) -> Result<(&'a str, Option<String>)> {
    match text.rsplit_once('@') {
        Some((place, snapshot)) if !snapshot.contains('/') => {
            if !is_snapshot_name(snapshot) {
                let why = "behind @ comes the name of a snapshot, of letters, digits, dots, dashes \
                           and underscores; an @ in the name of a volume is written %40";
                return Err(parameters.wrong(why));
            }
            Ok((place, Some(snapshot.to_owned())))
        }
        _ => Ok((text, None)),
    }
}

/// The default name of an export of a volume, or of its snapshot.
pub(super) fn export_of(name: String, snapshot: Option<&str>) -> String {
    match snapshot {
        None => name,
        Some(snapshot) => format!("{name}@{snapshot}"),
    }
}

impl Objects {
    /// One in that store, or its snapshot, with the parameters that all of them take.
    pub(super) fn parse(
        name: String,
        export: String,
        (store, snapshot): (Arc<dyn VolumeStore>, Option<String>),
        parameters: &mut Parameters,
    ) -> Result<Arc<dyn Source>> {
        let cache_dir = parameters.take_path("cache-dir")?;
        let cache_bytes = parameters.take_bytes("cache-size")?;
        let key = take_key(parameters)?;
        Ok(Arc::new(Self { name, export, store, snapshot, cache_dir, cache_bytes, key }))
    }

    fn volume(&self) -> Result<StoredVolume> {
        let journals = match &self.cache_dir {
            Some(dir) => dir.clone(),
            None => state_dir()?.join("volumes"),
        };
        let (name, key, store) = (self.name.clone(), self.key.clone(), Arc::clone(&self.store));
        Ok(StoredVolume { name, store, journals, key, snapshot: self.snapshot.clone() })
    }
}

/// Where the key is. The text never has the key itself, since texts are shown and recorded.
fn take_key(parameters: &mut Parameters) -> Result<Option<KeySource>> {
    let sources = [
        parameters.take_path("key-file")?.map(KeySource::File),
        parameters.take("key-env")?.map(KeySource::Environment),
        parameters.take(KEY_COMMAND)?.map(KeySource::Command),
    ];
    let mut given = sources.into_iter().flatten();
    match (given.next(), given.next()) {
        (key, None) => Ok(key),
        _ => Err(parameters.wrong("a volume has one key; give it once")),
    }
}

impl Source for Objects {
    fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        let default = Tuning::default();
        let cache_bytes = self.cache_bytes.unwrap_or(default.cache_bytes);
        let tuning = Tuning { cache_bytes, ..default };
        let volume = self.volume()?;
        Ok(match self.snapshot {
            None => Arc::new(volume.open_tuned(options.take_over, tuning)?),
            Some(_) => Arc::new(volume.open_snapshot(tuning)?),
        })
    }

    fn name(&self) -> String {
        self.export.clone()
    }

    fn identity(&self) -> Result<Option<String>> {
        self.volume()?.identity().map(Some)
    }

    fn place(&self) -> Option<String> {
        let place = self.store.place()?;
        Some(match &self.snapshot {
            None => place,
            Some(snapshot) => format!("{place}@{snapshot}"),
        })
    }

    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        Ok(location.to_owned() + &absolute_paths(query, &["cache-dir", "key-file"])?)
    }

    fn object_volume(&self) -> Option<Result<StoredVolume>> {
        Some(self.volume())
    }
}
