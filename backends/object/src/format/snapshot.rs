//! Snapshots, the ancestors of a clone, and pins.

use super::code::{Reader, Wrong, put_kind, take_kind};
use super::root::{
    Committed, FramePlace, NUMBER_MAX, Reach, SIZE_MAX, put_directory, put_previous,
    take_directory, take_previous,
};
use crate::ids::{Blocks, Lsn, Seq, VolumeId};

/// The most bytes of the name of a snapshot.
pub const SNAPSHOT_NAME_BYTES_MAX: usize = 128;
/// The most bytes of a snapshot in a directory.
pub(crate) const SNAPSHOT_BYTES_MAX: u64 = 74 + SNAPSHOT_NAME_BYTES_MAX as u64;
/// The most bytes of the name of a volume that is an ancestor, or a clone.
pub const SIBLING_NAME_BYTES_MAX: usize = 255;
const PIN_MAGIC: [u8; 8] = *b"SHVPIN\r\n";

/// A state of a volume that stays. It is the map of a checkpoint, so that nothing is folded to read
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, which no other snapshot of the volume ever has.
    pub id: u64,
    /// Its name, which no other one has at the same time.
    pub name: String,
    /// The part of the log that it has.
    pub committed: Committed,
    /// The checkpoint that has just that; `None`: nothing was ever written.
    pub checkpoint: Option<CheckpointPlace>,
    /// The size of the volume.
    pub size: Blocks,
    /// When it was made, in milliseconds since 1970.
    pub at_ms: u64,
}

/// Where the directory of a checkpoint is, and the epoch of that object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointPlace {
    /// The directory.
    pub directory: FramePlace,
    /// The epoch of its object.
    pub reach: Reach,
}

/// A volume from which a clone has its first objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The number of the first object that is not this owner's.
    pub end: Seq,
    /// The volume.
    pub volume: VolumeId,
    /// Its name beside the clone: the last part of its place.
    pub name: String,
}

/// What a root knows of snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotNews {
    /// How many the volume has.
    pub count: u32,
    /// The number of the last one that was made; 0 before the first one.
    pub last: u64,
    /// Those that are newer than the checkpoint that the root names, in the order of their numbers.
    pub added: Vec<Snapshot>,
    /// Those that this checkpoint has and that are deleted since.
    pub removed: Vec<u64>,
    /// Those that are being deleted, of which no clone may be made any more.
    pub deleting: Vec<u64>,
}

/// Whether a snapshot can have that name.
#[must_use]
pub fn is_snapshot_name(name: &str) -> bool {
    let is_kept = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=SNAPSHOT_NAME_BYTES_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(is_kept)
}

/// Whether a volume beside another one can have that name: it is one part of a path.
pub(crate) fn is_sibling_name(name: &str) -> bool {
    (1..=SIBLING_NAME_BYTES_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.chars().any(|c| c == '/' || c.is_control())
}

impl Snapshot {
    /// The number of the object with its map: an object that is born later is none of its own.
    #[must_use]
    pub fn last_object(&self) -> Seq {
        self.checkpoint.map_or(self.committed.seq, |checkpoint| checkpoint.directory.seq)
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        out.extend(self.committed.seq.0.to_le_bytes());
        out.extend(self.committed.lsn.0.to_le_bytes());
        put_directory(out, self.checkpoint.map(|checkpoint| checkpoint.directory));
        put_previous(out, self.checkpoint.map(|checkpoint| checkpoint.reach));
        out.extend(self.size.to_le_bytes());
        out.extend(self.at_ms.to_le_bytes());
        put_name(out, &self.name);
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, Wrong> {
        let id = reader.u64()?;
        let committed = Committed { seq: Seq(reader.u64()?), lsn: Lsn(reader.u64()?) };
        let checkpoint = match (take_directory(reader)?, take_previous(reader)?) {
            (None, None) => None,
            (Some(directory), Some(reach)) => Some(CheckpointPlace { directory, reach }),
            _ => return Err(CONTRADICTS),
        };
        let [size, at_ms] = [reader.u64()?, reader.u64()?];
        let name = take_name(reader)?;
        let snapshot = Self { id, name, committed, checkpoint, size, at_ms };
        match snapshot.is_right() {
            true => Ok(snapshot),
            false => Err(CONTRADICTS),
        }
    }

    fn is_right(&self) -> bool {
        let is_behind = match self.checkpoint {
            None => self.committed == Committed::default(),
            Some(CheckpointPlace { directory, reach }) => {
                self.committed.seq <= directory.seq && reach.first <= directory.seq
            }
        };
        let numbers = [self.id, self.last_object().0, self.committed.lsn.0];
        is_behind
            && self.id > 0
            && numbers.iter().all(|number| *number <= NUMBER_MAX)
            && self.size <= SIZE_MAX
            && is_snapshot_name(&self.name)
    }
}

const CONTRADICTS: Wrong = Wrong::Damaged("its snapshots contradict one another");

/// Appends snapshots, after their count.
pub(super) fn put_snapshots(out: &mut Vec<u8>, snapshots: &[Snapshot]) {
    snapshots.iter().for_each(|snapshot| snapshot.put(out));
}

/// Takes that many, which are in objects up to one, in the order of their numbers.
pub(super) fn take_snapshots(
    reader: &mut Reader<'_>,
    count: usize,
    last: Committed,
) -> Result<Vec<Snapshot>, Wrong> {
    // The count may be wrong: room is taken for what is there.
    let mut snapshots = Vec::<Snapshot>::new();
    for _ in 0..count {
        let snapshot = Snapshot::take(reader)?;
        let is_next = snapshots.last().is_none_or(|before| before.id < snapshot.id);
        let is_in = snapshot.last_object() <= last.seq && snapshot.committed.lsn <= last.lsn;
        if !is_next || !is_in {
            return Err(CONTRADICTS);
        }
        snapshots.push(snapshot);
    }
    Ok(snapshots)
}

impl SnapshotNews {
    /// All snapshots of the volume, whose checkpoint has those; `None` if both contradict one
    /// another.
    #[must_use]
    pub fn with(&self, mut of_checkpoint: Vec<Snapshot>) -> Option<Vec<Snapshot>> {
        let all = &mut of_checkpoint;
        let before = all.len();
        all.retain(|snapshot| !self.removed.contains(&snapshot.id));
        let are_gone = before - all.len() == self.removed.len();
        all.extend(self.added.iter().cloned());
        let are_in_order = all.windows(2).all(|pair| pair[0].id < pair[1].id);
        let is_whole = all.len() == self.count as usize;
        let is_there = |id: &u64| all.iter().any(|snapshot| snapshot.id == *id);
        let is_right = are_gone && are_in_order && is_whole && self.deleting.iter().all(is_there);
        is_right.then_some(of_checkpoint)
    }

    /// The same for a root that names a checkpoint with all of them.
    #[must_use]
    pub fn behind_checkpoint(&self) -> Self {
        Self { added: Vec::new(), removed: Vec::new(), ..self.clone() }
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.last.to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend((self.added.len() as u16).to_le_bytes());
        put_snapshots(out, &self.added);
        for ids in [&self.removed, &self.deleting] {
            out.extend((ids.len() as u16).to_le_bytes());
            ids.iter().for_each(|id| out.extend(id.to_le_bytes()));
        }
    }

    pub(super) fn take(reader: &mut Reader<'_>, committed: Committed) -> Result<Self, Wrong> {
        let (last, count) = (reader.u64()?, reader.u32()?);
        let added = usize::from(reader.u16()?);
        let added = take_snapshots(reader, added, committed)?;
        let [removed, deleting] = [take_ids(reader)?, take_ids(reader)?];
        let is_made = |id: &u64| (1..=last).contains(id);
        let is_right = added.len() as u64 <= u64::from(count)
            && added.iter().map(|snapshot| &snapshot.id).chain(&removed).all(is_made)
            && deleting.iter().all(|id| is_made(id) && !removed.contains(id))
            && !added.iter().any(|snapshot| removed.contains(&snapshot.id));
        match is_right && last <= NUMBER_MAX {
            true => Ok(Self { count, last, added, removed, deleting }),
            false => Err(CONTRADICTS),
        }
    }
}

fn take_ids(reader: &mut Reader<'_>) -> Result<Vec<u64>, Wrong> {
    (0..reader.u16()?).map(|_| reader.u64()).collect()
}

/// Appends the ancestors of a volume.
pub(super) fn put_owners(out: &mut Vec<u8>, owners: &[Owner]) {
    out.extend((owners.len() as u16).to_le_bytes());
    for Owner { end, volume, name } in owners {
        out.extend(end.0.to_le_bytes());
        out.extend(volume.0);
        put_name(out, name);
    }
}

/// Takes the ancestors of a volume, in the order of their objects.
pub(super) fn take_owners(reader: &mut Reader<'_>) -> Result<Vec<Owner>, Wrong> {
    let mut owners = Vec::<Owner>::new();
    for _ in 0..reader.u16()? {
        let (end, volume) = (Seq(reader.u64()?), VolumeId(reader.array()?));
        let owner = Owner { end, volume, name: take_name(reader)? };
        let begin = owners.last().map_or(Seq(1), |before| before.end);
        if end <= begin || end.0 > NUMBER_MAX || !is_sibling_name(&owner.name) {
            return Err(Wrong::Damaged("its ancestors contradict one another"));
        }
        owners.push(owner);
    }
    Ok(owners)
}

/// What a pin has: the clone for which a snapshot stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The clone.
    pub clone: VolumeId,
    /// Its name beside the volume with the snapshot.
    pub name: String,
}

impl Pin {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        put_kind(&mut out, PIN_MAGIC);
        out.extend(self.clone.0);
        put_name(&mut out, &self.name);
        out.extend(crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Reads it from its bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, Wrong> {
        let (body, crc) = bytes.split_last_chunk().ok_or(Wrong::Damaged("it ends too early"))?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err(Wrong::Damaged("its checksum is wrong"));
        }
        let mut reader = Reader::new(body);
        take_kind(&mut reader, PIN_MAGIC)?;
        let pin = Self { clone: VolumeId(reader.array()?), name: take_name(&mut reader)? };
        match reader.is_empty() && is_sibling_name(&pin.name) {
            true => Ok(pin),
            false => Err(Wrong::Damaged("the name of the clone cannot be")),
        }
    }
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend((name.len() as u16).to_le_bytes());
    out.extend(name.as_bytes());
}

fn take_name(reader: &mut Reader<'_>) -> Result<String, Wrong> {
    let len = usize::from(reader.u16()?);
    let text = std::str::from_utf8(reader.bytes(len)?);
    text.map(str::to_owned).map_err(|_| Wrong::Damaged("a name is no text"))
}
