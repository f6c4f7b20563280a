//! What the schemes of object volumes have in common.

use std::path::PathBuf;
use std::sync::Arc;

use sheave_core::{Result, Volume};
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
    /// Where this node keeps the journal, if the text says it.
    cache_dir: Option<PathBuf>,
    /// Bytes of the read cache there, if the text says it.
    cache_bytes: Option<u64>,
    /// Where its key is, if it is encrypted.
    key: Option<KeySource>,
}

impl Objects {
    /// One in that store, with the parameters that all of them take.
    pub(super) fn parse(
        name: String,
        export: String,
        store: Arc<dyn VolumeStore>,
        parameters: &mut Parameters,
    ) -> Result<Arc<dyn Source>> {
        let cache_dir = parameters.take_path("cache-dir")?;
        let cache_bytes = parameters.take_bytes("cache-size")?;
        let key = take_key(parameters)?;
        Ok(Arc::new(Self { name, export, store, cache_dir, cache_bytes, key }))
    }

    fn volume(&self) -> Result<StoredVolume> {
        let journals = match &self.cache_dir {
            Some(dir) => dir.clone(),
            None => state_dir()?.join("volumes"),
        };
        let (name, key, store) = (self.name.clone(), self.key.clone(), Arc::clone(&self.store));
        Ok(StoredVolume { name, store, journals, key })
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
        Ok(Arc::new(self.volume()?.open_tuned(options.take_over, tuning)?))
    }

    fn name(&self) -> String {
        self.export.clone()
    }

    fn identity(&self) -> Result<Option<String>> {
        self.volume()?.identity().map(|id| Some(id.to_string()))
    }

    fn place(&self) -> Option<String> {
        self.store.place()
    }

    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        Ok(location.to_owned() + &absolute_paths(query, &["cache-dir", "key-file"])?)
    }

    fn object_volume(&self) -> Option<Result<StoredVolume>> {
        Some(self.volume())
    }
}
