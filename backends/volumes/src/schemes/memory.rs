//! `memory:?size=1G`: in memory, sparse.

use std::sync::Arc;

use sheave_core::{Result, Volume};
use sheave_local::Memory;

use crate::parse::Parameters;
use crate::source::{Scheme, Source, Url};
use crate::spec::{LAYER_PARAMETERS, OpenOptions};

pub(crate) const SCHEME: Scheme = Scheme { names: &["memory"], starts_program: false, parse };

/// The largest volume: offsets in files are signed.
const SIZE_MAX: u64 = i64::MAX as u64;

#[derive(Debug)]
struct InMemory {
    size: u64,
    overcommit: bool,
}

fn parse(url: &Url<'_>, parameters: &mut Parameters) -> Result<Arc<dyn Source>> {
    let size = take_size(url, parameters)?;
    let overcommit = parameters.take_switch("overcommit")?.unwrap_or(false);
    Ok(Arc::new(InMemory { size, overcommit }))
}

impl Source for InMemory {
    fn open(&self, _: &OpenOptions) -> Result<Arc<dyn Volume>> {
        Ok(Arc::new(Memory::new(self.size)?))
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn stated_size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn memory_wanted(&self) -> Option<u64> {
        (!self.overcommit).then_some(self.size)
    }
}

/// The size of a volume that has no other property.
pub(super) fn take_size(url: &Url<'_>, parameters: &mut Parameters) -> Result<u64> {
    if !url.rest.is_empty() {
        return Err(parameters.wrong("nothing may stand before ?size="));
    }
    let Some(size) = parameters.take_bytes("size")? else {
        // It may be misspelt, so the unknown parameters are named first.
        parameters.refuse_all_but(&LAYER_PARAMETERS)?;
        return Err(parameters.wrong("the size is missing; add ?size=1G"));
    };
    if size > SIZE_MAX {
        let why = format!("size={size}: the most is one byte less than 8E");
        return Err(parameters.wrong(&why));
    }
    Ok(size)
}
