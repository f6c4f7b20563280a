//! `null:?size=1T`: reads zeroes, discards writes.

use std::sync::Arc;

use sheave_core::{Result, Volume};

use super::memory::take_size;
use crate::parse::Parameters;
use crate::source::{Scheme, Source, Url};
use crate::spec::OpenOptions;

pub(crate) const SCHEME: Scheme = Scheme { names: &["null"], starts_program: false, parse };

#[derive(Debug)]
struct Null {
    size: u64,
}

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    Ok(Arc::new(Null { size: take_size(url, parameters)? }))
}

impl Source for Null {
    fn open(&self, _: &OpenOptions) -> Result<Arc<dyn Volume>> {
        Ok(Arc::new(sheave_local::Null::new(self.size)))
    }

    fn name(&self) -> String {
        "null".to_owned()
    }

    fn stated_size(&self) -> Option<u64> {
        Some(self.size)
    }
}
