//! Journals that are damaged, do not fit their volume, or are in use.

use super::*;

/// A journal in which three records are flushed, and its disk.
fn flushed(states: bool) -> Disk {
    let (mut life, _, mut disk) = Life::open(Disk::default().to_dir(), 1, Lsn(0));
    for block in 0..3 {
        let bytes = vec![block as u8 + 1; BLOCK_BYTES as usize];
        life.driver.run_one(ops::write(block * BLOCK_BYTES, &bytes)).unwrap();
    }
    life.driver.run_one(Op::Flush).unwrap();
    if states {
        life.driver.run_one(ops::zeroes(0, BLOCK_BYTES)).unwrap();
    }
    life.trace.lock().unwrap().iter().for_each(|event| disk.apply(event));
    disk.killed()
}

impl Disk {
    /// Flips a bit of a page of the only segment that is used.
    fn damage(&mut self, page: usize) {
        let used = self.stable.values_mut().find(|bytes| bytes[..8] == *b"SHEAVEJS").unwrap();
        used[page * PAGE_BYTES + 100] ^= 1;
    }

    pub(super) fn recover(&self, committed: Lsn) -> Result<Recovered> {
        JournalDir::open(self.to_dir().path(), SIZE)?.recover((VOLUME, None), committed)
    }
}

#[test]
fn damage_of_what_was_flushed_is_refused() {
    // Header, then pages 1 and 2, 3 and 4, 5 and 6, and the record at page 7.
    let whole = flushed(true);
    assert_eq!(whole.recover(Lsn(0)).unwrap().next, Lsn(5));
    for page in 1..7 {
        let mut disk = whole.clone();
        disk.damage(page);
        let error = disk.recover(Lsn(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let lsn = format!("LSN {} ", page.div_ceil(2));
        assert!(error.to_string().contains(&lsn), "page {page}: {error}");
    }
    // The record behind them was not flushed.
    let mut disk = whole;
    disk.damage(7);
    assert_eq!(disk.recover(Lsn(0)).unwrap().next, Lsn(4));
}

#[test]
fn a_damaged_header_hides_nothing_that_was_flushed() {
    let mut disk = flushed(true);
    disk.damage(0);
    let error = disk.recover(Lsn(0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("up to LSN 3 was flushed"), "{error}");
    // The bucket has it, so it is of no use any more, and its file is used anew.
    let recovered = disk.recover(Lsn(4)).unwrap();
    assert_eq!((recovered.next, recovered.free.len()), (Lsn(5), SIZE.segments_max));
}

#[test]
fn without_a_later_record_the_last_one_may_be_the_torn_tail() {
    let mut disk = flushed(false);
    disk.damage(5);
    assert_eq!(disk.recover(Lsn(0)).unwrap().next, Lsn(3));
}

#[test]
fn a_journal_that_does_not_fit_the_bucket_is_refused() {
    let (mut life, _, mut disk) = Life::open(Disk::default().to_dir(), 1, Lsn(0));
    // A segment has room for two of these.
    let fill = |life: &mut Life, count| {
        for _ in 0..count {
            let bytes = vec![7; 8 * BLOCK_BYTES as usize];
            life.driver.run_one(ops::write(0, &bytes)).unwrap();
        }
    };
    fill(&mut life, 4);
    life.engine.with(|front| front.tick(0));
    while life.commit() {}
    // The next segment states that the first ones are committed.
    fill(&mut life, 2);
    life.driver.run_one(Op::Flush).unwrap();
    fill(&mut life, 2);
    life.trace.lock().unwrap().iter().for_each(|event| disk.apply(event));
    let disk = disk.killed();
    assert_eq!(disk.recover(Lsn(4)).unwrap().next, Lsn(9));
    let refused = |committed| {
        let error = disk.recover(Lsn(committed)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string()
    };
    assert!(refused(3).contains("rolled back"), "{}", refused(3));
    let dir = disk.to_dir();
    let journal = JournalDir::open(dir.path(), SIZE).unwrap();
    let other = journal.recover((VolumeId([6; 16]), None), Lsn(4)).unwrap_err();
    assert!(other.to_string().contains("another volume"), "{other}");
    // A segment in between is gone, and was flushed.
    let chain = journal.segments().unwrap().chain;
    let gone = chain.iter().position(|(header, _)| header.first > Lsn(4)).unwrap();
    chain[gone].1.clear().unwrap();
    drop((chain, journal));
    let journal = JournalDir::open(dir.path(), SIZE).unwrap();
    assert_eq!(journal.recover((VOLUME, None), Lsn(4)).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_journal_is_open_once_and_is_kept_when_it_is_set_aside() {
    use crate::open::Journal as _;
    let dir = flushed(true).to_dir();
    let mut journal = JournalDir::open(dir.path(), SIZE).unwrap();
    let busy = JournalDir::open(dir.path(), SIZE).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    let [first, committed, last] = [1, 0, 4].map(Lsn);
    assert_eq!(journal.summary().unwrap(), Some(Summary { committed, first, last }));
    let aside = journal.set_aside().unwrap();
    assert!(aside.to_str().unwrap().ends_with("epoch-0-lsn-1-4.orphan"), "{aside:?}");
    assert!(aside.join("segment-0").is_file());
    assert_eq!(journal.summary().unwrap(), None);
    let opening = Opening { epoch: Epoch(3), incarnation: Incarnation([3; 16]) };
    journal.adopt(VOLUME, None, opening).unwrap();
    drop(journal);
    let mut journal = JournalDir::open(dir.path(), SIZE).unwrap();
    let adopting = Superblock { volume: VOLUME, current: None, adopting: Some(opening) };
    assert_eq!(journal.superblock().unwrap(), Some(adopting));
    journal.settle(opening).unwrap();
    let settled = Superblock { volume: VOLUME, current: Some(opening), adopting: None };
    assert_eq!(journal.superblock().unwrap(), Some(settled));
}

#[test]
fn a_journal_with_nothing_but_a_damaged_header_is_set_aside_too() {
    use crate::open::Journal as _;
    let mut disk = flushed(true);
    disk.damage(0);
    let dir = disk.to_dir();
    let opening = Opening { epoch: Epoch(1), incarnation: Incarnation([1; 16]) };
    let superblock = Superblock { volume: VOLUME, current: Some(opening), adopting: None };
    superblock.write(&superblock_path(dir.path())).unwrap();
    let mut journal = JournalDir::open(dir.path(), SIZE).unwrap();
    let [committed, first, last] = [0, 1, 4].map(Lsn);
    assert_eq!(journal.summary().unwrap(), Some(Summary { committed, first, last }));
    let aside = journal.set_aside().unwrap();
    assert!(aside.to_str().unwrap().ends_with("epoch-1-lsn-1-4.orphan"), "{aside:?}");
    assert_eq!(journal.recover((VOLUME, None), Lsn(7)).unwrap().next, Lsn(8));
}

#[test]
fn reads_of_the_journal_are_checked() {
    let written = flushed(true);
    let (mut life, _, _) = Life::open(written.to_dir(), 2, Lsn(0));
    let new = vec![9; BLOCK_BYTES as usize];
    life.driver.run_one(ops::write(9 * BLOCK_BYTES, &new)).unwrap();
    let read = |life: &mut Life, block: u64| {
        life.driver.run_one(ops::read(block * BLOCK_BYTES, BLOCK_BYTES))
    };
    assert_eq!(ops::bytes(read(&mut life, 9)), new);
    assert_eq!(ops::bytes(read(&mut life, 2))[0], 3);
    // A bit of each block: one was found in the journal, one is written now.
    for entry in fs::read_dir(journal_path(life.dir.path())).unwrap() {
        let file = File::options().read(true).write(true).open(entry.unwrap().path()).unwrap();
        let mut page = [0; PAGE_BYTES];
        for at in (0..file.metadata().unwrap().len()).step_by(PAGE_BYTES) {
            file.read_exact_at(&mut page, at).unwrap();
            if page == [9; PAGE_BYTES] || page == [3; PAGE_BYTES] {
                file.write_all_at(&[page[7] ^ 1], at + 7).unwrap();
            }
        }
    }
    for block in [2, 9] {
        let error = read(&mut life, block).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("the data is damaged"), "{error}");
    }
    assert_eq!(ops::bytes(read(&mut life, 1))[0], 2);
}
