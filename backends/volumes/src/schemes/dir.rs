//! `dir:///store/name`: an object volume in a directory; with `@snapshot` its snapshot.

use std::sync::Arc;

use sheave_core::Result;
use sheave_object::DirStore;

use super::file::url_path;
use super::objects::{Objects, export_of, split_snapshot};
use crate::names::export_name;
use crate::parse::Parameters;
use crate::source::{Scheme, Source, Url};

pub(crate) const SCHEME: Scheme = Scheme { names: &["dir"], starts_program: false, parse };

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    let (place, snapshot) = split_snapshot(url.rest, parameters)?;
    let path = url_path(place)?;
    let Some((path, name)) = path.as_deref().and_then(|path| Some((path, path.file_name()?)))
    else {
        let why = "behind dir:// comes an absolute path, dir:///store/name";
        return Err(parameters.wrong(why));
    };
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(parameters.wrong("no file name holds a zero byte"));
    }
    let store = Arc::new(DirStore::new(path));
    let export = export_of(export_name(name), snapshot.as_deref());
    Objects::parse(url.location.to_owned(), export, (store, snapshot), parameters)
}
