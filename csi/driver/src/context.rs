//! What ControllerPublishVolume tells NodeStageVolume, and a class its volumes (csi.v1:
//! `publish_context`, `volume_context`). Neither has secrets.

use std::collections::HashMap;

use tonic::Status;

/// Key of the publish context: the epoch of the publication, a decimal number.
const EPOCH: &str = "epoch";
/// Key of the publish context: `true` if the node may only read.
const READ_ONLY: &str = "readonly";
/// Key of the volume context: which driver makes the device; `auto`, `ublk` or `nbd`.
pub(crate) const FRONT: &str = "front";
/// Key of the volume context: seconds of unstaging after which hanging storage is given up.
pub(crate) const FORCE_UNSTAGE_AFTER: &str = "force-unstage-after";

/// What the context of a publication says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Publication {
    /// Of the publication, if the caller knows it.
    pub epoch: Option<u64>,
    /// Whether the node may only read.
    pub read_only: bool,
}

impl Publication {
    /// Reads a publish context.
    ///
    /// # Errors
    /// INVALID_ARGUMENT.
    pub fn of(context: &HashMap<String, String>) -> Result<Self, Status> {
        let epoch = context.get(EPOCH).map(|text| text.parse()).transpose();
        let epoch = epoch.map_err(|_| {
            let text = context.get(EPOCH).map_or("", String::as_str);
            Status::invalid_argument(format!("publish_context {EPOCH}: {text:?} is no number"))
        })?;
        let read_only = context.get(READ_ONLY).is_some_and(|text| text == "true");
        Ok(Self { epoch, read_only })
    }

    /// As a publish context.
    #[must_use]
    pub fn to_context(self) -> HashMap<String, String> {
        let epoch = self.epoch.map(|epoch| (EPOCH.to_owned(), epoch.to_string()));
        let read_only = self.read_only.then(|| (READ_ONLY.to_owned(), "true".to_owned()));
        epoch.into_iter().chain(read_only).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_survives_the_context() {
        for read_only in [false, true] {
            let publication = Publication { epoch: Some(u64::MAX), read_only };
            assert_eq!(Publication::of(&publication.to_context()).unwrap(), publication);
        }
        assert_eq!(Publication::of(&HashMap::new()).unwrap(), Publication::default());
        let wrong = HashMap::from([(EPOCH.to_owned(), "one".to_owned())]);
        assert_eq!(Publication::of(&wrong).unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
