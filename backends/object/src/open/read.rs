//! Reads headers and indexes of log objects, and directories.

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};

use crate::cipher::VolumeKey;
use crate::format::{
    Directory, FramePlace, HEADER_BYTES, Head, Header, ObjectId, Root, Wrong, decode_directory,
    keys,
};
use crate::retry::Requests;
use crate::sources::Sources;
use crate::together::{all, boxed};

/// What the first request for an object asks for: its header, and an index of usual length.
const HEAD_BYTES: u64 = 512 << 10;

/// Reads an object; `None` if there is none.
pub(crate) async fn read(requests: &Requests, id: ObjectId) -> Result<Option<Head>> {
    let key = keys::log(id.epoch, id.seq);
    match requests.get(&key, 0..HEAD_BYTES).await? {
        None => Ok(None),
        Some(begin) => parse(requests, id, begin).await.map(Some),
    }
}

/// Reads objects at the same time. Each has an outcome of its own, in their order.
pub(super) async fn read_all(requests: &Requests, ids: &[ObjectId]) -> Vec<Result<Option<Head>>> {
    all(ids.iter().map(|id| boxed(read(requests, *id))).collect()).await
}

/// Reads an object, of which the begin is there.
pub(super) async fn parse(requests: &Requests, id: ObjectId, begin: Bytes) -> Result<Head> {
    let header = Header::decode(&begin).map_err(|why| wrong(requests, id, why))?;
    let index = HEADER_BYTES..header.index_end();
    let entries = match begin.get(index.clone()) {
        Some(index) => header.decode_index(index),
        None => {
            let key = keys::log(id.epoch, id.seq);
            let index = requests.get(&key, index.start as u64..index.end as u64).await?;
            header.decode_index(&index.ok_or_else(|| missing(requests, id))?)
        }
    };
    Ok(Head { header, entries: entries.map_err(|why| wrong(requests, id, why))? })
}

/// Reads the directory of a checkpoint, and the heads behind it.
pub(super) async fn read_directory(
    sources: &Sources,
    id: ObjectId,
    place: FramePlace,
) -> Result<(Directory, Vec<Head>)> {
    let (requests, _) = sources.of(id.seq);
    let key = keys::log(id.epoch, id.seq);
    let begin = u64::from(place.at);
    let stored = requests.get(&key, begin..begin + u64::from(place.bytes)).await?;
    let stored = stored.ok_or_else(|| missing(requests, id))?;
    let found = decode_directory(sources.reader(id), place.at, &stored);
    found.map_err(|why| wrong(requests, id, why))
}

/// The directory that a root names, which is in an object.
pub(crate) async fn directory_of(
    requests: &Requests,
    root: &Root,
    key: Option<&VolumeKey>,
    id: ObjectId,
) -> Result<Directory> {
    let sources = Sources::new(requests, root, key.cloned())?;
    let place = root.directory.ok_or_else(|| missing(requests, id))?;
    read_directory(&sources, id, place).await.map(|(directory, _)| directory)
}

fn wrong(requests: &Requests, id: ObjectId, wrong: Wrong) -> Error {
    match wrong {
        Wrong::Damaged(why) => corrupt(requests, id, why),
        Wrong::Newer(_) => {
            let key = keys::log(id.epoch, id.seq);
            requests.error(ErrorKind::Unsupported, "open", &key, &wrong.to_string())
        }
    }
}

pub(super) fn missing(requests: &Requests, id: ObjectId) -> Error {
    corrupt(requests, id, "the object is missing; something else has deleted it")
}

pub(super) fn corrupt(requests: &Requests, id: ObjectId, why: &str) -> Error {
    requests.error(ErrorKind::Corrupt, "open", &keys::log(id.epoch, id.seq), why)
}
