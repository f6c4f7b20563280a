//! A node that is lost with its journal.

use std::path::Path;

use super::*;

/// Copies a store that is in use. What its newest root needs stays until there is a newer one.
pub(super) fn copy_store(from: &Path, to: &Path) {
    let newest = || {
        let roots = std::fs::read_dir(from.join("root")).unwrap();
        roots.map(|root| root.unwrap().file_name()).min()
    };
    loop {
        let before = newest();
        copy_dir(from, to);
        if newest() == before {
            return;
        }
        std::fs::remove_dir_all(to).unwrap();
    }
}

/// Copies the roots before the objects that they name, and not what is deleted meanwhile.
fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    let mut entries: Vec<_> = std::fs::read_dir(from).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
    for entry in entries {
        let (name, kind) = (entry.file_name(), entry.file_type().unwrap());
        match (name == "tmp", kind.is_dir()) {
            (true, _) => {}
            (_, true) => copy_dir(&entry.path(), &to.join(name)),
            (_, false) => match std::fs::copy(entry.path(), to.join(name)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copied => drop(copied.unwrap()),
            },
        }
    }
}

#[test]
fn without_the_journal_the_store_has_all_up_to_some_write() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut driver = ops::driver(&volume);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut below = |end: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % end
    };
    // Write n fills some blocks with n; every fifth one zeroes them.
    let mut writes: Vec<(u64, u64)> = Vec::new();
    let mut last_found = 0;
    for round in 0..12 {
        for _ in 0..40 {
            let start = below(BLOCKS);
            let count = (1 + below(6)).min(BLOCKS - start);
            writes.push((start, count));
            let bytes = (count * BLOCK_BYTES) as usize;
            let op = match writes.len() % 5 {
                0 => ops::zeroes(start * BLOCK_BYTES, bytes as u64),
                _ => {
                    let words = (writes.len() as u64).to_le_bytes().repeat(bytes / 8);
                    ops::write(start * BLOCK_BYTES, &words)
                }
            };
            driver.run_one(op).unwrap();
        }
        // The node is lost with its journal: another one opens what the store has.
        let copy = Place::empty();
        copy_store(&place.dir.path().join("store"), &copy.dir.path().join("store"));
        let other = copy.open("b", true);
        let mut reader = ops::driver(&other);
        let found: Vec<u64> = (0..BLOCKS)
            .map(|block| {
                let bytes = ops::bytes(reader.run_one(read(block)));
                u64::from_le_bytes(*bytes.first_chunk().unwrap())
            })
            .collect();
        let mut state = vec![0; BLOCKS as usize];
        let is_prefix = |state: &[u64]| state == found;
        let mut upto = is_prefix(&state).then_some(0);
        for (index, (start, count)) in writes.iter().enumerate() {
            let number = if (index + 1) % 5 == 0 { 0 } else { index as u64 + 1 };
            state[*start as usize..(start + count) as usize].fill(number);
            if is_prefix(&state) {
                upto = Some(index + 1);
            }
        }
        let upto = upto.unwrap_or_else(|| panic!("round {round}: a mixture: {found:?}"));
        assert!(upto >= last_found, "it goes back: {upto} after {last_found}");
        last_found = upto;
    }
    assert!(last_found > 100, "the store had up to {last_found} of {}", writes.len());
}
