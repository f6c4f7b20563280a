//! Volumes that are made longer.

use super::*;

#[test]
fn a_closed_volume_grows_and_never_shrinks() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    let resize = |size| block_on(life::resize(&bucket.requests, size));
    bucket.write(&journal, &[&[(0, 9, 1)]], true);
    let before = block_on(find(&bucket.requests)).unwrap();
    let error = resize(SIZE - 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("would cut data off"), "{error}");
    assert_eq!(resize(SIZE).unwrap(), before, "nothing is made");
    assert_eq!(resize(2 * SIZE).unwrap().number, before.number + 1);
    // A node that was here before finds its journal and the new size.
    let opened = bucket.open(journal.clone(), false).unwrap();
    assert_eq!((opened.size, journal.0.lock().unwrap().set_aside), (2 * SIZE, 0));
    assert!(bucket.read(&opened, 8, SIZE).unwrap() == filled(&[(1, 1), (SIZE - 1, 0)]));
    let error = resize(3 * SIZE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    commit(opened, &[&[(2 * SIZE - 1, 1, 2)]], true).unwrap();
    // An opening that has found the root before meets the new one.
    let newest = block_on(find(&bucket.requests)).unwrap();
    resize(3 * SIZE).unwrap();
    let incarnation = Incarnation([9; 16]);
    let request = Request { node: "b".to_owned(), incarnation, take_over: false, key: None };
    assert!(block_on(claim(&bucket.requests, &request, &newest)).unwrap().is_none());
    let opened = bucket.open(journal, false).unwrap();
    assert!(bucket.read(&opened, 2 * SIZE - 1, 2).unwrap() == filled(&[(1, 2), (1, 0)]));
}
