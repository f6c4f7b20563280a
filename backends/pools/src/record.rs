//! What is known of a volume beside its data, and the rules by which that changes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result, printable};
use uuid::Uuid;

/// What this program writes and reads.
const FORMAT: u32 = 1;
/// What a volume is marked with that a program has had as a raw block device.
const RAW: &str = "block";
/// The publications of a volume for several nodes.
const PUBLICATIONS_MAX: usize = 1024;
/// The users of a volume that are noted: the first of them show that it has had several.
const USERS_MAX: usize = 16;
/// The user of a volume that was published before users were noted.
const UNKNOWN: &str = "of before";
/// The user of a volume that the operator of a node has attached for writing.
const OPERATOR: &str = "sheave attach";

/// A volume's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub(crate) format: u32,
    /// Identifies it in its pool; never used again.
    pub uuid: Uuid,
    /// Unique in its pool.
    pub name: String,
    /// Its data is being deleted; the volume exists no more.
    #[serde(default)]
    pub(crate) deleting: bool,
    /// The file system that it holds. Once set, and unless `formatting`, none is made on it again.
    pub formatted: Option<String>,
    /// Its first file system is being made, or that was interrupted: no user has written to it.
    #[serde(default)]
    pub formatting: bool,
    /// It was not made by its pool, so it may hold data.
    pub never_format: bool,
    /// Of the newest publication; 0 before the first. It only rises.
    pub epoch: u64,
    /// The nodes that may use it.
    pub publications: Vec<Publication>,
    /// What has ever had it, once each: CLAIM@NODE of its publications, which is empty for CSI, and
    /// `sheave attach`. At most 16 are noted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<String>,
    /// In a pool that nodes share, the last daemon that had it for writing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) writer: Option<Writer>,
    /// Bytes per second; 0 is no limit.
    pub limit_bps: u64,
    /// Ops per second; 0 is no limit.
    pub limit_iops: u64,
    /// What its creator keeps with it.
    pub parameters: BTreeMap<String, String>,
}

/// A daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Writer {
    /// Identifies its state directory.
    pub(crate) daemon: Uuid,
    /// Its node, for messages.
    pub(crate) host: String,
}

/// A node's right to use a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// The node's id.
    pub node: String,
    /// What the node shows to use it.
    pub epoch: u64,
    /// The node may not write.
    pub read_only: bool,
    /// Which nodes may use the volume at once.
    pub mode: AccessMode,
    /// As a raw block device, not a file system.
    pub block: bool,
    /// What the publisher knows it by, if it does not keep the volume's id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub claim: String,
}

/// Which nodes may use a volume at once, and how (the CSI specification, `AccessMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the specification's names")]
pub enum AccessMode {
    SingleNodeWriter,
    SingleNodeReaderOnly,
    MultiNodeReaderOnly,
    MultiNodeSingleWriter,
    MultiNodeMultiWriter,
    SingleNodeSingleWriter,
    SingleNodeMultiWriter,
}

impl AccessMode {
    /// All modes.
    pub const ALL: [Self; 7] = [
        Self::SingleNodeWriter,
        Self::SingleNodeReaderOnly,
        Self::MultiNodeReaderOnly,
        Self::MultiNodeSingleWriter,
        Self::MultiNodeMultiWriter,
        Self::SingleNodeSingleWriter,
        Self::SingleNodeMultiWriter,
    ];

    /// Whether several nodes may use a volume at once.
    #[must_use]
    pub fn is_multi_node(self) -> bool {
        matches!(
            self,
            Self::MultiNodeReaderOnly | Self::MultiNodeSingleWriter | Self::MultiNodeMultiWriter
        )
    }

    /// Whether no node may write.
    #[must_use]
    pub fn is_reader_only(self) -> bool {
        matches!(self, Self::SingleNodeReaderOnly | Self::MultiNodeReaderOnly)
    }
}

impl Record {
    /// Of a new, empty volume.
    #[must_use]
    pub fn new(uuid: Uuid, name: &str) -> Self {
        Self {
            format: FORMAT,
            uuid,
            name: name.to_owned(),
            deleting: false,
            formatted: None,
            formatting: false,
            never_format: false,
            epoch: 0,
            publications: Vec::new(),
            users: Vec::new(),
            writer: None,
            limit_bps: 0,
            limit_iops: 0,
            parameters: BTreeMap::new(),
        }
    }

    /// Whether this program knows what it says.
    pub(crate) fn check_format(&self) -> Result<(), String> {
        match self.format {
            FORMAT => Ok(()),
            other => Err(format!("it has format {other}, and this program knows {FORMAT}")),
        }
    }

    /// Lets a node use the volume. The same again is the same publication.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when the node has it in another way, [`ErrorKind::Busy`] when another
    /// node has it and not both modes are for several nodes.
    pub fn publish(&mut self, wanted: &Publication) -> Result<u64> {
        let op = "publish";
        let name = &self.name;
        if let Some(has) = self.publications.iter().find(|has| has.node == wanted.node) {
            if *has == (Publication { epoch: has.epoch, ..wanted.clone() }) {
                return Ok(has.epoch);
            }
            let why = format!(
                "{name} is published to node {} in another way ({}); unpublish it first",
                printable(&has.node),
                has.shown()
            );
            return Err(Error::new(ErrorKind::Exists, op, why));
        }
        let other = self.publications.iter().find(|has| {
            !(has.mode.is_multi_node() && wanted.mode.is_multi_node() && has.mode == wanted.mode)
        });
        if let Some(has) = other {
            let why = format!(
                "{name} is published to node {} ({}); unpublish it there first",
                printable(&has.node),
                has.shown()
            );
            return Err(Error::new(ErrorKind::Busy, op, why));
        }
        if self.publications.len() >= PUBLICATIONS_MAX {
            let why = format!("{name} is published to {PUBLICATIONS_MAX} nodes, which is the most");
            return Err(Error::new(ErrorKind::NoSpace, op, why));
        }
        self.note_user(&wanted.user());
        self.epoch += 1;
        self.publications.push(Publication { epoch: self.epoch, ..wanted.clone() });
        Ok(self.epoch)
    }

    fn note_user(&mut self, user: &str) {
        if self.users.is_empty() && self.epoch > 0 {
            self.users.push(UNKNOWN.to_owned());
        }
        if self.users.len() < USERS_MAX && self.users.iter().all(|has| has != user) {
            self.users.push(user.to_owned());
        }
    }

    /// Ends the use of a node, or of all; true if something changed. A daemon that was the writer
    /// for a publication is that no more.
    pub fn unpublish(&mut self, node: Option<&str>) -> bool {
        let had = self.publications.len();
        if self.is_written_by(node) {
            self.writer = None;
        }
        self.publications.retain(|has| node.is_some_and(|node| node != has.node));
        self.publications.len() != had
    }

    /// Whether a node, or one of all, may write.
    pub(crate) fn is_written_by(&self, node: Option<&str>) -> bool {
        let is_meant = |has: &&Publication| node.is_none_or(|node| node == has.node);
        self.publications.iter().filter(is_meant).any(|has| !has.read_only)
    }

    /// The publication of this node with this epoch.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] when the node has it no more, or not yet.
    pub fn published(&self, node: &str, epoch: u64) -> Result<&Publication> {
        let found = self.publications.iter().find(|has| has.node == node && has.epoch == epoch);
        found.ok_or_else(|| {
            let why = format!(
                "{} is not published to node {} with epoch {epoch}; its newest epoch is {}: \
                 publish it again",
                self.name,
                printable(node),
                self.epoch
            );
            Error::new(ErrorKind::Fenced, "check the publication", why)
        })
    }

    /// Notes that the operator of a node has attached the volume for writing, see
    /// [`Self::mark_raw`].
    pub fn mark_attached(&mut self) {
        self.note_user(OPERATOR);
        self.mark_raw();
    }

    /// Notes that a program has the volume as a raw block device and may write anything to it, so
    /// it is never formatted from now on.
    fn mark_raw(&mut self) {
        if !self.never_format && (self.formatted.is_none() || self.formatting) {
            self.formatted = Some(RAW.to_owned());
            self.formatting = false;
        }
    }

    /// Notes that the volume holds a file system from now on, or that its first one is `begun`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when it holds another one or must not be formatted, and
    /// [`ErrorKind::Fenced`] when no node has it with this epoch.
    pub fn mark_formatted(&mut self, fs_type: &str, begun: bool, epoch: u64) -> Result<()> {
        let refuse = |kind, why| Err(Error::new(kind, "mark as formatted", why));
        let name = &self.name;
        if !self.publications.iter().any(|has| has.epoch == epoch && !has.read_only) {
            let why = format!("{name} is not published for writing with epoch {epoch}");
            return refuse(ErrorKind::Fenced, why);
        }
        match &self.formatted {
            Some(has) if has == fs_type && !self.formatting && !begun => Ok(()),
            Some(has) if !self.formatting => {
                let why = format!("{name} holds {has} already, and {fs_type} was asked for");
                refuse(ErrorKind::Busy, why)
            }
            None if self.never_format => {
                let why = format!("{name} was not made by its pool, so it is never formatted");
                refuse(ErrorKind::Busy, why)
            }
            _ => {
                self.formatted = Some(fs_type.to_owned());
                self.formatting = begun;
                Ok(())
            }
        }
    }
}

impl Publication {
    /// What has the volume by it: a claim means another thing on another node.
    fn user(&self) -> String {
        match self.claim.as_str() {
            "" => String::new(),
            claim => format!("{claim}@{}", self.node),
        }
    }

    /// How the node has the volume, for a person.
    fn shown(&self) -> String {
        let how = if self.read_only { "read-only" } else { "for writing" };
        let what = if self.block { "as a block device" } else { "as a file system" };
        match self.claim.as_str() {
            "" => format!("{:?}, {how}, {what}", self.mode),
            claim => format!("{:?}, {how}, {what}, for {}", self.mode, printable(claim)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(node: &str, mode: AccessMode) -> Publication {
        let read_only = mode.is_reader_only();
        let (node, claim) = (node.to_owned(), String::new());
        Publication { node, epoch: 0, read_only, mode, block: false, claim }
    }

    fn record() -> Record {
        Record::new(Uuid::nil(), "a")
    }

    #[test]
    fn rule_07_a_volume_for_one_node_is_published_to_one() {
        use AccessMode::*;
        for mode in [SingleNodeWriter, SingleNodeReaderOnly, SingleNodeSingleWriter] {
            let mut record = record();
            assert_eq!(record.publish(&wanted("n1", mode)).unwrap(), 1);
            assert_eq!(record.publish(&wanted("n1", mode)).unwrap(), 1, "the same again");
            let busy = record.publish(&wanted("n2", mode)).unwrap_err();
            assert_eq!(busy.kind(), ErrorKind::Busy);
            assert!(busy.to_string().contains("n1"), "{busy}");
            let other = Publication { read_only: true, block: true, ..wanted("n1", mode) };
            assert_eq!(record.publish(&other).unwrap_err().kind(), ErrorKind::Exists);
        }
    }

    #[test]
    fn a_publication_is_of_its_claim_only() {
        let mode = AccessMode::SingleNodeMultiWriter;
        let claimed = |claim: &str| Publication { claim: claim.to_owned(), ..wanted("n1", mode) };
        let mut record = record();
        for _ in 0..2 {
            assert_eq!(record.publish(&claimed("pv1")).unwrap(), 1);
        }
        for claim in ["pv2", ""] {
            let other = record.publish(&claimed(claim)).unwrap_err();
            assert_eq!(other.kind(), ErrorKind::Exists);
            assert!(other.to_string().contains("for pv1"), "{other}");
        }
        record.unpublish(None);
        assert_eq!(record.publish(&claimed("")).unwrap(), 2);
        assert_eq!(record.publish(&claimed("pv1")).unwrap_err().kind(), ErrorKind::Exists);
    }

    #[test]
    fn what_has_ever_had_a_volume_is_noted_once() {
        let mode = AccessMode::SingleNodeMultiWriter;
        let mut record = record();
        let mut publish = |claim: &str, node: &str| {
            let wanted = Publication { claim: claim.to_owned(), ..wanted(node, mode) };
            for _ in 0..2 {
                record.publish(&wanted).unwrap();
            }
            record.unpublish(None);
        };
        for claim in ["docker:a", "", "docker:a", ""] {
            publish(claim, "n1");
        }
        publish("", "n2");
        record.mark_attached();
        let other = Publication { claim: "docker:a".to_owned(), ..wanted("n2", mode) };
        record.publish(&other).unwrap();
        assert_eq!(record.users, ["docker:a@n1", "", OPERATOR, "docker:a@n2"]);
        for number in 0..2 * USERS_MAX {
            record.note_user(&number.to_string());
        }
        assert_eq!(record.users.len(), USERS_MAX);
        // It may have had others before they were noted.
        let mut old = Record { epoch: 3, ..self::record() };
        old.publish(&Publication { claim: "docker:a".to_owned(), ..wanted("n1", mode) }).unwrap();
        assert_eq!(old.users, [UNKNOWN, "docker:a@n1"]);
    }

    #[test]
    fn rule_07_a_volume_for_readers_is_published_to_several() {
        let mut record = record();
        for (node, epoch) in [("n1", 1), ("n2", 2), ("n1", 1)] {
            let wanted = wanted(node, AccessMode::MultiNodeReaderOnly);
            assert_eq!(record.publish(&wanted).unwrap(), epoch);
        }
        let writer = wanted("n3", AccessMode::SingleNodeWriter);
        assert_eq!(record.publish(&writer).unwrap_err().kind(), ErrorKind::Busy);
        assert!(record.published("n1", 1).is_ok() && record.published("n2", 2).is_ok());
    }

    #[test]
    fn rule_36_every_publication_has_a_higher_epoch_and_an_old_one_is_worth_nothing() {
        let mut record = record();
        let mode = AccessMode::SingleNodeWriter;
        assert_eq!(record.publish(&wanted("n1", mode)).unwrap(), 1);
        assert!(record.published("n1", 1).is_ok());
        assert!(record.unpublish(Some("n1")) && !record.unpublish(Some("n1")));
        assert_eq!(record.published("n1", 1).unwrap_err().kind(), ErrorKind::Fenced);
        assert_eq!(record.publish(&wanted("n2", mode)).unwrap(), 2);
        assert_eq!(record.published("n1", 1).unwrap_err().kind(), ErrorKind::Fenced);
        assert_eq!(record.published("n1", 2).unwrap_err().kind(), ErrorKind::Fenced);
        assert!(record.unpublish(None));
        assert_eq!(record.publish(&wanted("n1", mode)).unwrap(), 3);
        assert_eq!(record.published("n1", 1).unwrap_err().kind(), ErrorKind::Fenced);
    }

    #[test]
    fn rule_18_the_mark_of_a_format_stays_and_needs_the_newest_epoch() {
        let mut record = record();
        let epoch = record.publish(&wanted("n1", AccessMode::SingleNodeWriter)).unwrap();
        let stale = record.mark_formatted("ext4", false, epoch + 1).unwrap_err();
        assert_eq!((stale.kind(), &record.formatted), (ErrorKind::Fenced, &None));
        record.mark_formatted("ext4", false, epoch).unwrap();
        record.mark_formatted("ext4", false, epoch).unwrap();
        for (fs_type, begun) in [("xfs", false), ("xfs", true), ("ext4", true)] {
            let refused = record.mark_formatted(fs_type, begun, epoch).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Busy, "{fs_type} {begun}");
        }
        assert_eq!((record.formatted.as_deref(), record.formatting), (Some("ext4"), false));
    }

    #[test]
    fn rule_18_what_is_begun_may_be_begun_again_and_what_is_done_stays() {
        let mut record = record();
        let epoch = record.publish(&wanted("n1", AccessMode::SingleNodeWriter)).unwrap();
        for fs_type in ["ext4", "ext4", "xfs"] {
            record.mark_formatted(fs_type, true, epoch).unwrap();
            assert_eq!((record.formatted.as_deref(), record.formatting), (Some(fs_type), true));
        }
        record.mark_formatted("xfs", false, epoch).unwrap();
        assert_eq!((record.formatted.as_deref(), record.formatting), (Some("xfs"), false));
        assert_eq!(record.mark_formatted("xfs", true, epoch).unwrap_err().kind(), ErrorKind::Busy);
    }

    #[test]
    fn rule_16_what_a_program_had_as_a_device_is_never_formatted() {
        let mut record = record();
        let epoch = record.publish(&wanted("n1", AccessMode::SingleNodeWriter)).unwrap();
        record.mark_formatted("ext4", true, epoch).unwrap();
        record.mark_raw();
        let refused = record.mark_formatted("ext4", true, epoch).unwrap_err();
        assert_eq!((refused.kind(), record.formatted.as_deref()), (ErrorKind::Busy, Some("block")));
        let mut done = Record { formatted: Some("xfs".to_owned()), ..self::record() };
        done.mark_raw();
        assert_eq!(done.formatted.as_deref(), Some("xfs"), "its file system stays");
    }

    #[test]
    fn rule_16_what_was_not_made_here_is_never_formatted() {
        let mut record = Record { never_format: true, ..record() };
        let epoch = record.publish(&wanted("n1", AccessMode::SingleNodeWriter)).unwrap();
        assert_eq!(record.mark_formatted("ext4", true, epoch).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(record.formatted, None);
    }
}
