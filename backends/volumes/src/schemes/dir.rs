//! `dir:///store/name`: an object volume in a directory.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use sheave_core::{Result, Volume};
use sheave_object::DirVolume;

use super::file::url_path;
use crate::names::{absolute_paths, export_name};
use crate::parse::Parameters;
use crate::source::{Scheme, Source, Url};
use crate::spec::OpenOptions;
use crate::state_dir::state_dir;

pub(crate) const SCHEME: Scheme = Scheme { names: &["dir"], starts_program: false, parse };

#[derive(Debug)]
struct Dir {
    /// The URL without its parameters.
    location: String,
    path: PathBuf,
    /// Where this node keeps the journal, if the text says it.
    cache_dir: Option<PathBuf>,
}

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    let path = url_path(url.rest)?.filter(|path| path.file_name().is_some());
    let Some(path) = path else {
        let why = "behind dir:// comes an absolute path, dir:///store/name";
        return Err(parameters.wrong(why));
    };
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(parameters.wrong("no file name holds a zero byte"));
    }
    let cache_dir = parameters.take_path("cache-dir")?;
    Ok(Arc::new(Dir { location: url.location.to_owned(), path, cache_dir }))
}

impl Dir {
    fn volume(&self) -> Result<DirVolume> {
        let journals = match &self.cache_dir {
            Some(dir) => dir.clone(),
            None => state_dir()?.join("volumes"),
        };
        Ok(DirVolume { name: self.location.clone(), dir: self.path.clone(), journals })
    }
}

impl Source for Dir {
    fn open(&self, options: &OpenOptions) -> Result<Arc<dyn Volume>> {
        Ok(Arc::new(self.volume()?.open(options.take_over)?))
    }

    fn name(&self) -> String {
        self.path.file_name().map_or_else(|| "volume".to_owned(), export_name)
    }

    fn identity(&self) -> Result<Option<String>> {
        self.volume()?.identity().map(|id| Some(id.to_string()))
    }

    fn place(&self) -> Option<String> {
        let path = fs::canonicalize(&self.path).ok()?;
        Some(format!("objects in {path:?}"))
    }

    fn absolute(&self, location: &str, query: &str) -> Result<String> {
        Ok(location.to_owned() + &absolute_paths(query, &["cache-dir"])?)
    }

    fn object_volume(&self) -> Option<Result<DirVolume>> {
        Some(self.volume())
    }
}
