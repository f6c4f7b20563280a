//! `s3:`: volumes made of objects in a bucket, which do not exist yet.

use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result};

use crate::parse::Parameters;
use crate::source::{Scheme, Source, Url};

pub(crate) const SCHEME: Scheme = Scheme { names: &["s3"], starts_program: false, parse };

fn parse(url: &Url<'_>, _: &mut Parameters) -> Result<Arc<dyn Source>> {
    let why = format!(
        "{}: volumes in buckets do not exist in this version; dir:///… keeps one in a directory",
        url.text
    );
    Err(Error::new(ErrorKind::Unsupported, "parse volume", why))
}
