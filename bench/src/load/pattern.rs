//! The checked pattern that a verifying load writes.
//!
//! Every 512-byte sector names itself, so that a sector that is stale, misplaced, torn or
//! corrupted tells what happened to it:
//!
//! ```text
//!  0        8          16           24         32                               512
//!  | magic  | address  | generation | checksum | pseudo-random words ...        |
//! ```
//! All words are little-endian. The checksum covers the other words and is mixed with the seed of
//! the run, so that data left behind by an earlier run does not pass.

use std::fmt;

/// The unit of the pattern in bytes. Loads that verify use multiples of it.
pub(crate) const SECTOR_SIZE: usize = 512;
const WORD: usize = 8;
const MAGIC: u64 = u64::from_le_bytes(*b"sheavebP");
const CHECKSUM_WORD: usize = 3;

/// How often the block at an address was written; 0 means never.
pub(crate) type Generation = u32;

/// Which generations a read may see: at least the last one acknowledged when the read was issued,
/// at most the last one issued when the read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// The oldest.
    pub(crate) oldest: Generation,
    /// The newest.
    pub(crate) newest: Generation,
}

/// What is wrong with a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// No pattern at all (zeroes, for instance) where one was written.
    Missing,
    /// A pattern whose checksum is wrong: torn inside the sector, or damaged.
    Corrupt,
    /// The pattern of another address.
    Misplaced {
        /// Where it belongs.
        belongs_at: u64,
    },
    /// A generation older than an acknowledged write.
    Stale {
        /// What was read.
        found: Generation,
    },
    /// A generation that has not been written yet.
    Unwritten {
        /// What was read.
        found: Generation,
    },
}

/// A sector that is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The sector's address in the volume, in bytes.
    pub(crate) address: u64,
    /// What is wrong.
    pub(crate) kind: FaultKind,
    /// What would have been right.
    pub(crate) allowed: Allowed,
    /// Other sectors of the same block are right: the block is torn.
    pub(crate) torn: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, allowed: Allowed { oldest, newest }, .. } = self;
        let torn = if self.torn { " (torn block)" } else { "" };
        write!(f, "sector at {address}{torn}: ")?;
        match self.kind {
            FaultKind::Missing => write!(f, "no pattern, generation {oldest} was written"),
            FaultKind::Corrupt => write!(f, "checksum wrong, generation {oldest} was written"),
            FaultKind::Misplaced { belongs_at } => write!(f, "holds the data of {belongs_at}"),
            FaultKind::Stale { found } => {
                write!(f, "stale, generation {found} after {oldest} was acknowledged")
            }
            FaultKind::Unwritten { found } => {
                write!(f, "generation {found}, of which only {newest} were written")
            }
        }
    }
}

/// Fills `block`, which begins at `address`, with the pattern of `generation`.
pub(crate) fn fill(block: &mut [u8], address: u64, generation: Generation, seed: u64) {
    for (sector, at) in block.chunks_exact_mut(SECTOR_SIZE).zip((address..).step_by(SECTOR_SIZE)) {
        fill_sector(sector, at, generation, seed);
    }
}

/// Checks `block`, read from `address`; the first fault found, if any.
///
/// # Errors
/// The fault.
pub(crate) fn check(block: &[u8], address: u64, allowed: Allowed, seed: u64) -> Result<(), Fault> {
    if allowed.oldest == 0 {
        // Nothing was acknowledged: whatever the volume held before may still be there.
        return Ok(());
    }
    let mut first: Option<(u64, FaultKind)> = None;
    let mut right_count = 0;
    for (sector, at) in block.chunks_exact(SECTOR_SIZE).zip((address..).step_by(SECTOR_SIZE)) {
        match check_sector(sector, at, allowed, seed) {
            Ok(()) => right_count += 1,
            Err(kind) => first = first.or(Some((at, kind))),
        }
    }
    first.map_or(Ok(()), |(address, kind)| {
        Err(Fault { address, kind, allowed, torn: right_count > 0 })
    })
}

fn fill_sector(sector: &mut [u8], address: u64, generation: Generation, seed: u64) {
    let mut state = seed ^ address.rotate_left(17) ^ u64::from(generation);
    let (words, _) = sector.as_chunks_mut::<WORD>();
    for word in words.iter_mut() {
        *word = next_random(&mut state).to_le_bytes();
    }
    words[0] = MAGIC.to_le_bytes();
    words[1] = address.to_le_bytes();
    words[2] = u64::from(generation).to_le_bytes();
    words[CHECKSUM_WORD] = checksum(words, seed).to_le_bytes();
}

fn check_sector(sector: &[u8], address: u64, allowed: Allowed, seed: u64) -> Result<(), FaultKind> {
    let (words, _) = sector.as_chunks::<WORD>();
    let [magic, belongs_at, found, stored] = [0, 1, 2, CHECKSUM_WORD].map(|i| word(words, i));
    if magic != MAGIC {
        return Err(FaultKind::Missing);
    }
    let is_whole = stored == checksum(words, seed);
    let is_racing = allowed.oldest != allowed.newest;
    if !is_whole && !is_racing {
        return Err(FaultKind::Corrupt);
    }
    if belongs_at != address {
        return Err(FaultKind::Misplaced { belongs_at });
    }
    if !is_whole {
        // Bytes of both generations: reads and writes in flight need not be atomic.
        return Ok(());
    }
    let found = Generation::try_from(found).map_err(|_| FaultKind::Corrupt)?;
    if found < allowed.oldest {
        return Err(FaultKind::Stale { found });
    }
    if found > allowed.newest {
        return Err(FaultKind::Unwritten { found });
    }
    Ok(())
}

fn word(words: &[[u8; WORD]], index: usize) -> u64 {
    u64::from_le_bytes(words[index])
}

/// Four lanes, each a multiply and a rotate per word: order and position of every bit count.
fn checksum(words: &[[u8; WORD]], seed: u64) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [seed, seed ^ 1, seed ^ 2, seed ^ 3];
    for (index, bytes) in words.iter().enumerate() {
        if index != CHECKSUM_WORD {
            let lane = &mut lanes[index % 4];
            *lane = (*lane ^ u64::from_le_bytes(*bytes)).wrapping_mul(K).rotate_left(29);
        }
    }
    lanes.iter().fold(0, |sum, lane| (sum ^ lane).wrapping_mul(K).rotate_left(31))
}

/// One step of SplitMix64 (public domain, Sebastiano Vigna).
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 7;
    const AT: u64 = 8192;

    fn block(address: u64, generation: Generation) -> Vec<u8> {
        let mut block = vec![0; 4096];
        fill(&mut block, address, generation, SEED);
        block
    }

    fn kind_of(block: &[u8], oldest: Generation, newest: Generation) -> Option<(FaultKind, bool)> {
        let result = check(block, AT, Allowed { oldest, newest }, SEED);
        result.err().map(|fault| (fault.kind, fault.torn))
    }

    #[test]
    fn right_data_passes() {
        assert_eq!(kind_of(&block(AT, 3), 3, 3), None);
        assert_eq!(kind_of(&block(AT, 4), 3, 5), None);
    }

    #[test]
    fn anything_passes_before_the_first_acknowledged_write() {
        assert_eq!(kind_of(&[0; 4096], 0, 0), None);
        assert_eq!(kind_of(&[0; 4096], 0, 1), None);
    }

    #[test]
    fn lost_data_is_missing() {
        assert_eq!(kind_of(&[0; 4096], 1, 1), Some((FaultKind::Missing, false)));
    }

    #[test]
    fn an_old_generation_is_stale() {
        assert_eq!(kind_of(&block(AT, 2), 3, 3), Some((FaultKind::Stale { found: 2 }, false)));
    }

    #[test]
    fn a_generation_from_the_future_is_unwritten() {
        let found = kind_of(&block(AT, 4), 3, 3);
        assert_eq!(found, Some((FaultKind::Unwritten { found: 4 }, false)));
    }

    #[test]
    fn data_of_another_address_is_misplaced() {
        let found = kind_of(&block(0, 3), 3, 3);
        assert_eq!(found, Some((FaultKind::Misplaced { belongs_at: 0 }, false)));
    }

    #[test]
    fn half_a_write_is_a_torn_block() {
        let mut torn = block(AT, 3);
        torn[2048..].copy_from_slice(&block(AT, 2)[2048..]);
        assert_eq!(kind_of(&torn, 3, 3), Some((FaultKind::Stale { found: 2 }, true)));
    }

    #[test]
    fn half_a_sector_is_corrupt() {
        let mut torn = block(AT, 3);
        torn[256..512].copy_from_slice(&block(AT, 2)[256..512]);
        assert_eq!(kind_of(&torn, 3, 3), Some((FaultKind::Corrupt, true)));
    }

    #[test]
    fn a_write_in_flight_may_tear_what_is_read_but_not_move_it() {
        let mut torn = block(AT, 3);
        torn[256..512].copy_from_slice(&block(AT, 2)[256..512]);
        assert_eq!(kind_of(&torn, 2, 3), None);
        torn[512..1024].copy_from_slice(&block(AT, 2)[..512]);
        let found = kind_of(&torn, 2, 3);
        assert_eq!(found, Some((FaultKind::Misplaced { belongs_at: AT }, true)));
        assert_eq!(kind_of(&block(AT, 1), 2, 3), Some((FaultKind::Stale { found: 1 }, false)));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = block(AT, 3);
        for bit in 0..SECTOR_SIZE * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(kind_of(&bad, 3, 3).is_some(), "bit {bit}");
        }
    }

    #[test]
    fn swapped_words_are_found() {
        let mut bad = block(AT, 3);
        for i in 0..8 {
            bad.swap(64 + i, 96 + i);
        }
        assert_eq!(kind_of(&bad, 3, 3), Some((FaultKind::Corrupt, true)));
    }

    #[test]
    fn data_of_another_run_does_not_pass() {
        let result = check(&block(AT, 3), AT, Allowed { oldest: 3, newest: 3 }, SEED + 1);
        assert_eq!(result.map_err(|fault| fault.kind), Err(FaultKind::Corrupt));
    }
}
