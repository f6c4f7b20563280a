//! The journal of a node: its superblock, and writes that survive a kill.

use std::path::PathBuf;

use sheave_core::Result;

use super::{Disk, Nodes};
use crate::ids::{Lsn, Opening, VolumeId};
use crate::journal::{Adopted, Summary, Superblock};
use crate::open::Journal;

/// The lock on a node's journal, which a killed process leaves.
pub(super) struct NodeLock {
    nodes: Nodes,
    node: usize,
}

impl NodeLock {
    pub(super) fn take(nodes: &Nodes, node: usize) -> Self {
        nodes.truth().disks[node].is_locked = true;
        Self { nodes: nodes.clone(), node }
    }
}

impl Drop for NodeLock {
    fn drop(&mut self) {
        self.nodes.truth().disks[self.node].is_locked = false;
    }
}

#[derive(Clone)]
pub(super) struct NodeJournal {
    pub(super) nodes: Nodes,
    pub(super) node: usize,
}

impl Journal for NodeJournal {
    fn prepare(&mut self, _: VolumeId) -> Result<()> {
        Ok(())
    }

    fn superblock(&self) -> Result<Option<Superblock>> {
        Ok(self.nodes.truth().disks[self.node].superblock)
    }

    fn summary(&self) -> Result<Option<Summary>> {
        let truth = self.nodes.truth();
        let writes = &truth.disks[self.node].writes;
        let ends = writes.keys().next().zip(writes.keys().next_back());
        Ok(ends.map(|(&first, &last)| Summary {
            committed: Lsn(first - 1),
            first: Lsn(first),
            last: Lsn(last),
        }))
    }

    fn set_aside(&mut self) -> Result<PathBuf> {
        self.nodes.truth().disks[self.node] = Disk { is_locked: true, ..Disk::default() };
        Ok(PathBuf::from("x.orphan"))
    }

    fn adopt(
        &mut self,
        volume: VolumeId,
        current: Option<Opening>,
        opening: Opening,
    ) -> Result<Adopted> {
        let superblock = Superblock { volume, current, adopting: Some(opening) };
        self.nodes.truth().disks[self.node].superblock = Some(superblock);
        Ok(Adopted::without_journal(opening))
    }
}
