//! Reads blocks of the bucket, and looks the map up again if what it said is gone: an object may
//! be deleted after a reading has found its blocks there.

use sheave_core::{Error, ErrorKind, Result};

use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::front::{By, Fetch};
use crate::ids::{BLOCK_BYTES, Lba};
use crate::map::Found;
use crate::volume::Engine;

/// What a job wants of the bucket.
///
/// # Errors
/// Those of the store, and [`ErrorKind::Corrupt`] when what the map says now is missing or damaged.
pub(crate) async fn fetch(engine: &Engine, fetcher: &Fetcher, fetch: &Fetch) -> Result<Vec<u8>> {
    let (lba, blocks) = (Lba(fetch.span.start), fetch.span.blocks);
    let outcome = match &fetch.by {
        By::Place(place) => fetcher.fetch(lba, blocks, *place).await,
        By::Leaf(leaf) => fetcher.fetch_by(leaf.clone(), fetch.span).await,
        By::Map => return look_again(engine, fetcher, fetch.span, None).await,
    };
    match outcome {
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            look_again(engine, fetcher, fetch.span, Some(error)).await
        }
        outcome => outcome,
    }
}

/// Reads blocks as the map has them now, until it says the same twice. What it says is at least as
/// new as what a reading has found before.
async fn look_again(
    engine: &Engine,
    fetcher: &Fetcher,
    span: Span,
    mut failed: Option<Error>,
) -> Result<Vec<u8>> {
    let mut tried = Vec::new();
    loop {
        let pieces = engine.with(|front| front.cover(span));
        if let Some(error) = failed.take().filter(|_| pieces == tried) {
            return Err(error);
        }
        match read(fetcher, span, &pieces).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => failed = Some(error),
            outcome => return outcome,
        }
        tried = pieces;
    }
}

async fn read(fetcher: &Fetcher, whole: Span, pieces: &[(Span, Found)]) -> Result<Vec<u8>> {
    let mut data = Vec::with_capacity((whole.blocks * BLOCK_BYTES) as usize);
    for &(span, found) in pieces {
        match found {
            Found::Zero => data.resize(data.len() + span.bytes() as usize, 0),
            Found::At(place) => {
                data.extend(fetcher.fetch(Lba(span.start), span.blocks, place).await?);
            }
            Found::In(leaf) => {
                let leaf = fetcher.load(leaf).await?;
                data.extend(fetcher.fetch_by(leaf, span).await?);
            }
        }
    }
    Ok(data)
}
