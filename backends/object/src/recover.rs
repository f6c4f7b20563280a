//! Which journal belongs to a volume (docs/format.md, rule 7).

use crate::format::{Committed, LastOpening};
use crate::ids::VolumeId;
use crate::journal::{Summary, Superblock};

/// What becomes of a journal at an opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is none, or it has nothing.
    Fresh,
    /// It has what the last opening wrote: it is replayed above the committed writes.
    Replay,
    /// The volume was written elsewhere since: it is kept aside.
    Orphan,
}

const ROLLED_BACK: &str = "the journal on this node is newer than the volume in the store, which \
    may be an old copy; restore the newer one, or move the journal away";

/// Judges by the last opening of the newest root, before anything is changed.
///
/// # Errors
/// Why it cannot be a journal of the volume as the bucket has it.
pub fn judge(
    volume: VolumeId,
    last: &LastOpening,
    journal: Option<&Superblock>,
) -> Result<Verdict, &'static str> {
    let Some(journal) = journal else { return Ok(Verdict::Fresh) };
    if journal.volume != volume {
        return Err(
            "the journal on this node is that of another volume; give it another cache-dir",
        );
    }
    let openings = [journal.current, journal.adopting].into_iter().flatten();
    if openings.clone().any(|opening| opening == last.opening) {
        return Ok(Verdict::Replay);
    }
    // An opening that was adopting it may have claimed, and not have become the last one.
    match journal.current {
        None => Ok(Verdict::Fresh),
        Some(current) if current.epoch < last.opening.epoch => Ok(Verdict::Orphan),
        // The same epoch of another incarnation is a copy that went on by itself.
        Some(_) => Err(ROLLED_BACK),
    }
}

/// Judges a journal that is to be replayed, when it is known what is committed.
///
/// # Errors
/// Why it does not continue the committed writes.
pub fn continues(committed: Committed, journal: Option<&Summary>) -> Result<(), &'static str> {
    let Some(journal) = journal else { return Ok(()) };
    // Whether it lacks writes that were flushed is judged when it is read.
    if journal.committed > committed.lsn { Err(ROLLED_BACK) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Incarnation, Lsn, Opening, Seq};

    const VOLUME: VolumeId = VolumeId([1; 16]);

    fn opening(epoch: u64, incarnation: u8) -> Opening {
        Opening { epoch: Epoch(epoch), incarnation: Incarnation([incarnation; 16]) }
    }

    #[test]
    fn a_journal_is_replayed_only_if_the_last_opening_had_it() {
        let last = LastOpening {
            opening: opening(5, 1),
            node: "a".to_owned(),
            first: Seq(9),
            is_closed: false,
        };
        let judge = |current, adopting| {
            judge(VOLUME, &last, Some(&Superblock { volume: VOLUME, current, adopting }))
        };
        let is_refused = |verdict: Result<_, _>| verdict.is_err();
        assert_eq!(judge(None, None), Ok(Verdict::Fresh));
        assert_eq!(judge(Some(opening(5, 1)), None), Ok(Verdict::Replay));
        assert_eq!(judge(Some(opening(4, 7)), Some(opening(5, 1))), Ok(Verdict::Replay), "adopted");
        assert_eq!(
            judge(Some(opening(5, 1)), Some(opening(6, 7))),
            Ok(Verdict::Replay),
            "not opened"
        );
        assert_eq!(judge(None, Some(opening(5, 1))), Ok(Verdict::Replay), "its first opening");
        assert_eq!(judge(None, Some(opening(4, 7))), Ok(Verdict::Fresh), "never opened");
        assert_eq!(judge(Some(opening(4, 7)), None), Ok(Verdict::Orphan));
        assert_eq!(judge(Some(opening(3, 7)), Some(opening(4, 7))), Ok(Verdict::Orphan));
        assert_eq!(judge(Some(opening(3, 7)), Some(opening(6, 7))), Ok(Verdict::Orphan));
        assert!(is_refused(judge(Some(opening(6, 7)), None)), "the bucket was rolled back");
        assert!(is_refused(judge(Some(opening(5, 2)), None)), "a copy went on");
        let other = VolumeId([2; 16]);
        let journal = Superblock { volume: VOLUME, current: None, adopting: None };
        assert!(is_refused(super::judge(other, &last, Some(&journal))));
        assert_eq!(super::judge(other, &last, None), Ok(Verdict::Fresh));
    }

    #[test]
    fn a_bucket_that_was_rolled_back_is_refused() {
        let committed = Committed { seq: Seq(3), lsn: Lsn(10) };
        let continues = |committed_then, first, last| {
            let [committed_then, first, last] = [committed_then, first, last].map(Lsn);
            continues(committed, Some(&Summary { committed: committed_then, first, last })).is_ok()
        };
        assert!(continues(10, 11, 10), "empty");
        assert!(continues(0, 1, 30) && continues(10, 11, 12) && continues(4, 5, 6));
        assert!(continues(10, 12, 20), "11 was not flushed, or recovery will say so");
        assert!(!continues(11, 5, 20), "the bucket was rolled back");
        assert!(super::continues(committed, None).is_ok());
    }
}
