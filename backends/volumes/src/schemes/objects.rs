//! What the schemes of object volumes have in common.

use std::path::PathBuf;
use std::sync::Arc;

use sheave_core::{Result, Volume};
use sheave_object::{StoredVolume, Tuning, VolumeStore};

use crate::names::absolute_paths;
use crate::parse::Parameters;
use crate::source::Source;
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
        Ok(Arc::new(Self { name, export, store, cache_dir, cache_bytes }))
    }

    fn volume(&self) -> Result<StoredVolume> {
        let journals = match &self.cache_dir {
            Some(dir) => dir.clone(),
            None => state_dir()?.join("volumes"),
        };
        Ok(StoredVolume { name: self.name.clone(), store: Arc::clone(&self.store), journals })
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
        Ok(location.to_owned() + &absolute_paths(query, &["cache-dir"])?)
    }

    fn object_volume(&self) -> Option<Result<StoredVolume>> {
        Some(self.volume())
    }
}
