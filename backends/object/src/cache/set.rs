//! The index of a part of the cache: which chunk is in which slot, and which one goes next.
//!
//! New chunks are on probation, in a tenth of the slots. One of which something is read again there
//! moves to the main queue, where a chunk stays as long as it is read. The names of others are
//! remembered for a while: a chunk that comes back soon begins in the main queue. So a scan passes
//! through the tenth, and leaves the rest alone (S3-FIFO, SOSP 2023).

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use super::ChunkKey;

/// Chunks on probation have one of so many slots.
const PROBATION_PART: usize = 10;
/// Readings of a chunk that count: it passes by the end of the main queue so often.
const READINGS_MAX: u8 = 3;
/// So many chunks are looked at for one that goes; then one that is read goes.
const TRIES_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Its bytes are being written.
    Filling,
    Ready,
}

#[derive(Debug)]
struct Slot {
    key: ChunkKey,
    state: State,
    /// Changes with every use of the slot.
    stamp: u64,
    len: u32,
    /// Which sixteenths of it a reading has begun in, since the last one that was counted.
    touched: u16,
    readings: u8,
    is_main: bool,
}

/// A slot, and the use of it: the bytes are those of the chunk as long as this is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) slot: u32,
    pub(super) stamp: u64,
    pub(super) len: u32,
}

/// A part of the cache.
#[derive(Debug)]
pub(super) struct Set {
    slots: Vec<Slot>,
    slots_max: usize,
    by_hash: HashMap<u64, u32, BuildHasherDefault<Hashed>>,
    free: Vec<u32>,
    probation: VecDeque<u32>,
    main: VecDeque<u32>,
    /// Hashes of chunks that have gone from probation, the oldest first.
    gone: VecDeque<u64>,
    is_gone: HashSet<u64, BuildHasherDefault<Hashed>>,
    stamp: u64,
    pub(super) bytes: u64,
    pub(super) evictions: u64,
}

impl Set {
    pub(super) fn new(slots_max: usize) -> Self {
        Self {
            slots: Vec::new(),
            slots_max,
            by_hash: HashMap::default(),
            free: Vec::new(),
            probation: VecDeque::new(),
            main: VecDeque::new(),
            gone: VecDeque::new(),
            is_gone: HashSet::default(),
            stamp: 0,
            bytes: 0,
            evictions: 0,
        }
    }

    /// Where a chunk is. A reading of it begins in that sixteenth, if there is one.
    ///
    /// One that begins where another one has begun counts: a scan in small steps is one reading.
    pub(super) fn find(&mut self, key: &ChunkKey, sixteenth: Option<u32>) -> Option<Use> {
        let index = *self.by_hash.get(&key.hash())?;
        let slot = &mut self.slots[index as usize];
        if slot.state != State::Ready || slot.key != *key {
            return None;
        }
        let touched = sixteenth.map_or(0, |sixteenth| 1 << sixteenth);
        if slot.touched & touched != 0 {
            slot.readings = READINGS_MAX.min(slot.readings + 1);
            slot.touched = touched;
        } else {
            slot.touched |= touched;
        }
        Some(Use { slot: index, stamp: slot.stamp, len: slot.len })
    }

    /// Whether a slot still has what it had.
    pub(super) fn is_still(&self, of: Use) -> bool {
        let slot = self.slots.get(of.slot as usize);
        slot.is_some_and(|slot| slot.stamp == of.stamp && slot.state == State::Ready)
    }

    /// A slot for a chunk, which is to be filled and then reported to [`Self::filled`]. `None` if
    /// the chunk is there, or no slot is to be had.
    pub(super) fn reserve(&mut self, key: ChunkKey, len: u32, may_grow: bool) -> Option<Use> {
        let hash = key.hash();
        if self.by_hash.contains_key(&hash) {
            return None;
        }
        let index = self.take_slot(may_grow)?;
        self.stamp += 1;
        let is_main = self.is_gone.remove(&hash);
        let stamp = self.stamp;
        self.slots[index as usize] =
            Slot { key, state: State::Filling, stamp, len, touched: 0, readings: 0, is_main };
        self.queue(is_main).push_back(index);
        self.by_hash.insert(hash, index);
        self.bytes += u64::from(len);
        Some(Use { slot: index, stamp, len })
    }

    /// The slot has the bytes of its chunk, or has not.
    pub(super) fn filled(&mut self, of: Use, is_whole: bool) {
        let slot = self.slots.get_mut(of.slot as usize);
        let Some(slot) = slot.filter(|slot| slot.stamp == of.stamp) else { return };
        match is_whole {
            true => slot.state = State::Ready,
            false => self.remove(of),
        }
    }

    /// Takes a chunk out.
    pub(super) fn remove(&mut self, of: Use) {
        let slot = self.slots.get(of.slot as usize);
        let is_same = |slot: &&Slot| slot.stamp == of.stamp && slot.state != State::Free;
        let Some(slot) = slot.filter(is_same) else { return };
        self.queue(slot.is_main).retain(|index| *index != of.slot);
        self.clear(of.slot);
        self.free.push(of.slot);
    }

    /// Keeps at most so many slots, the first ones.
    pub(super) fn shrink(&mut self, slots: usize) {
        for index in slots..self.slots.len() {
            if self.slots[index].state != State::Free {
                self.clear(index as u32);
            }
        }
        self.slots.truncate(slots);
        self.slots.shrink_to_fit();
        let is_there = |index: &u32| (*index as usize) < slots;
        self.probation.retain(is_there);
        self.main.retain(is_there);
        self.free.retain(is_there);
    }

    /// Slots that have been used.
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    fn queue(&mut self, is_main: bool) -> &mut VecDeque<u32> {
        if is_main { &mut self.main } else { &mut self.probation }
    }

    fn take_slot(&mut self, may_grow: bool) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        if may_grow && self.slots.len() < self.slots_max {
            self.slots.push(Slot {
                key: ChunkKey::default(),
                state: State::Free,
                stamp: 0,
                len: 0,
                touched: 0,
                readings: 0,
                is_main: false,
            });
            return Some(self.slots.len() as u32 - 1);
        }
        self.evict()
    }

    /// The slot of a chunk that goes.
    fn evict(&mut self) -> Option<u32> {
        for tries in 0..2 * TRIES_MAX {
            let is_long = self.probation.len() * PROBATION_PART >= self.slots.len();
            let is_main = self.probation.is_empty() || (!is_long && !self.main.is_empty());
            let index = self.queue(is_main).pop_front()?;
            let slot = &mut self.slots[index as usize];
            let stays = slot.readings > 0 && tries < TRIES_MAX;
            if slot.state == State::Filling {
                self.queue(is_main).push_back(index);
            } else if stays && is_main {
                slot.readings -= 1;
                self.main.push_back(index);
            } else if stays {
                (slot.readings, slot.is_main) = (0, true);
                self.main.push_back(index);
            } else {
                if !is_main {
                    let hash = slot.key.hash();
                    self.remember(hash);
                }
                self.clear(index);
                self.evictions += 1;
                return Some(index);
            }
        }
        None
    }

    fn remember(&mut self, hash: u64) {
        if self.gone.len() >= self.slots.len()
            && let Some(oldest) = self.gone.pop_front()
        {
            self.is_gone.remove(&oldest);
        }
        if self.is_gone.insert(hash) {
            self.gone.push_back(hash);
        }
    }

    /// Forgets what a slot has, but not its place in a queue.
    fn clear(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.state = State::Free;
        self.stamp += 1;
        slot.stamp = self.stamp;
        self.bytes -= u64::from(slot.len);
        let hash = slot.key.hash();
        self.by_hash.remove(&hash);
    }
}

/// Takes a hash as it is.
#[derive(Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("hashes are whole numbers");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ObjectId;
    use crate::ids::{Epoch, Seq};

    fn key(index: u32) -> ChunkKey {
        let object = ObjectId { epoch: Epoch(1), seq: Seq(1) };
        ChunkKey { history: 1, object, index }
    }

    fn insert(set: &mut Set, index: u32) -> Option<Use> {
        let of = set.reserve(key(index), 100, true)?;
        set.filled(of, true);
        Some(of)
    }

    /// Reads the same part of a chunk; true if it is there.
    fn read(set: &mut Set, index: u32) -> bool {
        set.find(&key(index), Some(0)).is_some()
    }

    #[test]
    fn a_scan_leaves_what_is_read_alone() {
        let mut set = Set::new(100);
        for index in 0..50 {
            insert(&mut set, index);
        }
        for _ in 0..3 {
            assert!((0..50).all(|index| read(&mut set, index)));
        }
        // A scan of ten times the size, in small steps.
        for index in 1000..2000 {
            insert(&mut set, index);
            for sixteenth in 0..16 {
                assert!(set.find(&key(index), Some(sixteenth)).is_some());
            }
        }
        let left = (0..50).filter(|index| read(&mut set, *index)).count();
        assert_eq!(left, 50);
        assert_eq!(set.slots(), 100);
    }

    #[test]
    fn what_comes_back_soon_stays() {
        let mut set = Set::new(100);
        (0..100).for_each(|index| assert!(insert(&mut set, index).is_some()));
        (100..150).for_each(|index| assert!(insert(&mut set, index).is_some()));
        assert!(!read(&mut set, 0));
        insert(&mut set, 0);
        (200..289).for_each(|index| assert!(insert(&mut set, index).is_some()));
        assert!(read(&mut set, 0), "it was on the main queue");
        assert!(!read(&mut set, 120));
    }

    #[test]
    fn its_memory_is_bounded_whatever_comes() {
        let mut set = Set::new(64);
        let mut random = 1_u64;
        let mut filling = Vec::new();
        for round in 0..20_000_u32 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let index = (random >> 40) as u32 % 300;
            match round % 7 {
                0 => drop(set.reserve(key(index), 100, true).map(|of| filling.push(of))),
                1 if filling.len() > 20 => set.filled(filling.swap_remove(0), round % 2 == 0),
                2 => drop(set.find(&key(index), None).map(|of| set.remove(of))),
                3 if round % 1000 == 3 => set.shrink(20),
                4 => drop(read(&mut set, index)),
                _ => {
                    insert(&mut set, index);
                }
            }
            let used = set.probation.len() + set.main.len();
            assert_eq!(used + set.free.len(), set.slots.len());
            assert_eq!((set.by_hash.len(), set.bytes), (used, used as u64 * 100));
            assert!(set.slots.len() <= 64 && set.gone.len() <= 64);
            assert!(set.is_gone.len() <= set.gone.len());
        }
    }

    #[test]
    fn a_use_ends_when_its_slot_is_used_anew() {
        let mut set = Set::new(1);
        let first = insert(&mut set, 1).unwrap();
        assert!(set.is_still(first));
        let second = set.reserve(key(2), 100, true).unwrap();
        assert_eq!(first.slot, second.slot);
        assert!(!set.is_still(first) && !set.is_still(second));
        assert!(set.find(&key(2), None).is_none(), "it is being filled");
        assert!(set.reserve(key(3), 100, true).is_none(), "the only slot is being filled");
        set.filled(second, true);
        assert!(set.is_still(second) && set.find(&key(1), None).is_none());
        set.shrink(0);
        assert!(!set.is_still(second));
    }
}
