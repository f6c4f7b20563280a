//! Where the objects of a volume are: its own, and those that a clone has from its ancestors.

use std::sync::Arc;

use sheave_core::Result;

use crate::cipher::VolumeKey;
use crate::format::{FrameReader, ObjectId, Owner, Root};
use crate::ids::{Seq, VolumeId};
use crate::retry::Requests;

/// The stores of a volume's objects. Of its ancestors' objects nothing is ever made or deleted.
#[derive(Clone, Debug)]
pub struct Sources {
    own: Requests,
    volume: VolumeId,
    /// In the order of their objects, which are before all of the volume's own.
    ancestors: Arc<[(Owner, Requests)]>,
    /// The key of all of them, if they are encrypted.
    key: Option<VolumeKey>,
}

impl Sources {
    /// Those of the volume whose root that is.
    ///
    /// # Errors
    /// When it has ancestors, and its store has no other volumes.
    pub fn new(requests: &Requests, root: &Root, key: Option<VolumeKey>) -> Result<Self> {
        let of = |owner: &Owner| Ok((owner.clone(), requests.beside(&owner.name)?));
        let ancestors: Result<Arc<[_]>> = root.owners.iter().map(of).collect();
        Ok(Self { own: requests.clone(), volume: root.volume, ancestors: ancestors?, key })
    }

    /// Those of a volume without ancestors and without a key.
    #[cfg(test)]
    pub(crate) fn of_volume(requests: &Requests, volume: VolumeId) -> Self {
        Self { own: requests.clone(), volume, ancestors: Arc::new([]), key: None }
    }

    /// The same with other requests, made of each.
    pub(crate) fn with(&self, of: impl Fn(&Requests) -> Requests) -> Self {
        let ancestors = self.ancestors.iter();
        let ancestors = ancestors.map(|(owner, requests)| (owner.clone(), of(requests))).collect();
        Self { own: of(&self.own), ancestors, ..self.clone() }
    }

    /// Its own objects.
    pub(crate) fn own(&self) -> &Requests {
        &self.own
    }

    /// The store of an object, and the volume that has made it.
    pub(crate) fn of(&self, seq: Seq) -> (&Requests, VolumeId) {
        match self.ancestors.iter().find(|(owner, _)| seq < owner.end) {
            Some((owner, requests)) => (requests, owner.volume),
            None => (&self.own, self.volume),
        }
    }

    /// Reads the frames of an object.
    pub(crate) fn reader(&self, object: ObjectId) -> FrameReader<'_> {
        let (_, volume) = self.of(object.seq);
        FrameReader::new(volume, object, self.key.as_ref())
    }
}
