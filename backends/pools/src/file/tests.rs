//! A file pool.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::*;
use crate::record::{AccessMode, Publication};

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn pool(dir: &Path) -> Arc<FilePool> {
    FilePool::new("fast", dir.to_owned(), limits(), None, None)
}

fn limits() -> Limits {
    Limits { capacity: None, max_size: None, default_size: 4 * MIB }
}

pub(super) fn new(name: &str) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        size: SizeRange::default(),
        limit_bps: 0,
        limit_iops: 0,
        parameters: BTreeMap::new(),
    }
}

pub(super) fn sized(name: &str, required: u64, limit: u64) -> NewVolume {
    NewVolume { size: SizeRange { required, limit }, ..new(name) }
}

/// The files of volumes, by kind.
pub(super) fn files(dir: &Path) -> BTreeSet<String> {
    let names = |dir: &Path| -> Vec<String> {
        let list = fs::read_dir(dir).into_iter().flatten().flatten();
        list.map(|entry| entry.file_name().into_string().unwrap()).collect()
    };
    let own = names(dir).into_iter().filter(|name| name != "names" && !name.starts_with(".sheave"));
    own.chain(names(&dir.join("names")).into_iter().map(|name| format!("names/{name}"))).collect()
}

#[test]
fn rule_02_a_name_is_one_volume() {
    let dir = tempfile::tempdir().unwrap();
    let made = pool(dir.path()).create(&new("a")).unwrap();
    assert_eq!((made.size, made.record.epoch, &made.trouble), (4 * MIB, 0, &None));
    for _ in 0..10 {
        assert_eq!(pool(dir.path()).create(&new("a")).unwrap(), made);
    }
    let other = pool(dir.path()).create(&new("b")).unwrap();
    assert!(other.record.uuid > made.record.uuid, "ids of later volumes are greater");
    assert_eq!(pool(dir.path()).list(None, usize::MAX).unwrap(), [made.clone(), other]);
    assert_eq!(pool(dir.path()).get(Key::Name("a")).unwrap(), made);
    assert_eq!(pool(dir.path()).get(Key::Uuid(made.record.uuid)).unwrap(), made);
}

#[test]
fn rule_13_a_page_reads_its_own_records_only() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let all = ["a", "b", "c"].map(|name| pool.create(&new(name)).unwrap());
    fs::write(pool.layout.record(all[0].record.uuid), "{").unwrap();
    fs::write(pool.layout.record(all[2].record.uuid), "{").unwrap();
    let page = pool.list(Some(all[0].record.uuid), 1).unwrap();
    assert_eq!(page, all[1..2]);
    assert_eq!(pool.list(Some(all[1].record.uuid), 9).unwrap().len(), 1);
}

#[test]
fn rule_03_the_same_name_otherwise_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let made = pool.create(&sized("a", 8 * MIB, 0)).unwrap();
    for same in [sized("a", 8 * MIB, 8 * MIB), sized("a", 4 * MIB, 0), sized("a", 0, 9 * MIB)] {
        assert_eq!(pool.create(&same).unwrap(), made);
    }
    let parameters = BTreeMap::from([("front".to_owned(), "nbd".to_owned())]);
    let others =
        [sized("a", 9 * MIB, 0), sized("a", 0, 4 * MIB), NewVolume { parameters, ..new("a") }];
    for other in others {
        assert_eq!(pool.create(&other).unwrap_err().kind(), ErrorKind::Exists, "{other:?}");
    }
    assert_eq!(files(dir.path()).len(), 3);
}

#[test]
fn rule_05_deleting_what_is_absent_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let made = pool.create(&new("a")).unwrap();
    pool.delete(Uuid::now_v7()).unwrap();
    for _ in 0..10 {
        pool.delete(made.record.uuid).unwrap();
    }
    assert_eq!(files(dir.path()), BTreeSet::new());
    let again = pool.create(&new("a")).unwrap();
    assert_ne!(again.record.uuid, made.record.uuid);
    pool.delete(made.record.uuid).unwrap();
    assert_eq!(pool.get(Key::Name("a")).unwrap(), again, "a late deletion of its predecessor");
}

#[test]
fn rule_06_a_volume_in_use_is_not_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let uuid = pool.create(&new("a")).unwrap().record.uuid;
    let before = files(dir.path());
    let open = pool.open_alone(uuid).unwrap();
    assert_eq!(pool.delete(uuid).unwrap_err().kind(), ErrorKind::Busy);
    drop(open);
    let wanted = Publication {
        node: "n1".to_owned(),
        epoch: 0,
        read_only: false,
        mode: AccessMode::SingleNodeWriter,
        block: false,
        claim: String::new(),
    };
    pool.update(uuid, &mut |record| record.publish(&wanted).map(drop)).unwrap();
    let busy = pool.delete(uuid).unwrap_err();
    assert!(busy.kind() == ErrorKind::Busy && busy.to_string().contains("n1"), "{busy}");
    assert_eq!(files(dir.path()), before);
    let open = pool.open_alone(uuid).unwrap();
    assert_eq!(pool.unpublish(uuid, None, true).unwrap_err().kind(), ErrorKind::Busy);
    pool.unpublish(uuid, Some("n2"), true).unwrap();
    drop(open);
    pool.unpublish(uuid, Some("n1"), true).unwrap();
    pool.delete(uuid).unwrap();
}

#[test]
fn a_volume_grows_and_never_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let uuid = pool.create(&new("a")).unwrap().record.uuid;
    let resize = |required, limit| pool.resize(uuid, SizeRange { required, limit });
    let _in_use = pool.open_alone(uuid).unwrap();
    assert_eq!(resize(8 * MIB + 1, 0).unwrap().size, 8 * MIB + 4096);
    assert_eq!(resize(2 * MIB, 0).unwrap().size, 8 * MIB + 4096, "it is long enough");
    assert_eq!(resize(2 * MIB, 2 * MIB).unwrap_err().kind(), ErrorKind::TooLarge);
    let absent = pool.resize(Uuid::nil(), SizeRange::default());
    assert_eq!(absent.unwrap_err().kind(), ErrorKind::NotFound);
}

fn limited(dir: &Path, limits: Limits) -> Arc<FilePool> {
    FilePool::new("small", dir.to_owned(), limits, None, None)
}

#[test]
fn rule_04_a_pool_bounds_the_size_of_a_volume() {
    let dir = tempfile::tempdir().unwrap();
    let pool = limited(dir.path(), Limits { max_size: Some(8 * MIB), ..limits() });
    assert_eq!(pool.capacity().unwrap().size_max, 8 * MIB);
    let refused = pool.create(&sized("a", 9 * MIB, 0)).unwrap_err();
    assert!(refused.kind() == ErrorKind::TooLarge && refused.to_string().contains("max_size"));
    let uuid = pool.create(&sized("a", 8 * MIB, 0)).unwrap().record.uuid;
    let longer = pool.resize(uuid, SizeRange { required: 9 * MIB, limit: 0 });
    assert_eq!(longer.unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(pool.get(Key::Uuid(uuid)).unwrap().size, 8 * MIB);
}

#[test]
fn volumes_of_a_pool_without_a_capacity_may_have_more_together_than_its_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let Capacity { available, size_max, .. } = pool.capacity().unwrap();
    let total = pool.layout.room().unwrap().total;
    assert!(available.unwrap() <= total && size_max == total.min(SIZE_MAX));
    // One that can never be filled is a mistake.
    let refused = pool.create(&sized("a", total + 1, 0)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::TooLarge, "{refused}");
    // A sparse image takes what is written, so all together may have more.
    for name in ["a", "b"] {
        let made = pool.create(&sized(name, total / 4 * 3, 0)).unwrap();
        let image = fs::metadata(pool.layout.image(made.record.uuid)).unwrap();
        assert!(made.size >= total / 4 * 3 && image.blocks() < 64, "{image:?}");
    }
}

#[test]
fn a_pool_with_a_capacity_becomes_full() {
    let dir = tempfile::tempdir().unwrap();
    let pool = limited(dir.path(), Limits { capacity: Some(10 * MIB), ..limits() });
    let uuid = pool.create(&sized("a", 6 * MIB, 0)).unwrap().record.uuid;
    assert_eq!(pool.capacity().unwrap().available, Some(4 * MIB));
    let full = pool.create(&sized("b", 5 * MIB, 0)).unwrap_err();
    assert!(full.kind() == ErrorKind::NoSpace && full.to_string().contains("small"), "{full}");
    let larger = SizeRange { required: 11 * MIB, limit: 0 };
    assert_eq!(pool.resize(uuid, larger).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(pool.create(&sized("a", 6 * MIB, 0)).unwrap().record.uuid, uuid);
    assert_eq!(files(dir.path()).len(), 3, "nothing is left of what did not fit");
    pool.create(&sized("b", 4 * MIB, 0)).unwrap();
}

#[test]
fn the_room_for_a_full_file_system_is_kept_anew_after_its_use() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    for name in ["a", "b"] {
        pool.create(&new(name)).unwrap();
        // As a change on a full file system uses it up where names cannot be exchanged.
        fs::remove_file(dir.path().join(".sheave-spare")).expect("it is there after every change");
    }
}

#[test]
fn a_directory_that_is_absent_is_an_error_and_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("not-mounted");
    let pool = pool(&missing);
    assert_eq!(pool.create(&new("a")).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(pool.delete(Uuid::nil()).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(pool.get(Key::Name("a")).unwrap_err().kind(), ErrorKind::Io);
    assert!(pool.list(None, usize::MAX).is_err() && pool.capacity().is_err() && !missing.exists());
}

/// The directory of a mount that is missing is there, and empty.
#[test]
fn a_directory_that_is_not_the_pool_any_more_is_an_error_and_stays_empty() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let memory = Some(state.path().to_owned());
    let remembering =
        || FilePool::new("fast", dir.path().to_owned(), limits(), memory.clone(), None);
    assert_eq!(remembering().list(None, usize::MAX).unwrap(), [], "a new pool");
    let made = remembering().create(&new("a")).unwrap();
    assert_eq!(remembering().list(None, usize::MAX).unwrap(), std::slice::from_ref(&made));
    let (aside, other) = (state.path().join("aside"), state.path().join("other"));
    fs::rename(dir.path(), &aside).unwrap();
    fs::create_dir(dir.path()).unwrap();
    let pool = remembering();
    let refused = pool.create(&new("a")).unwrap_err();
    assert!(refused.kind() == ErrorKind::Io && refused.to_string().contains("mounted?"));
    assert_eq!(pool.get(Key::Name("a")).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(pool.delete(made.record.uuid).unwrap_err().kind(), ErrorKind::Io);
    assert!(pool.list(None, usize::MAX).is_err() && pool.capacity().is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is written there");
    // Another pool in its place.
    self::pool(dir.path()).create(&new("a")).unwrap();
    let refused = pool.get(Key::Name("a")).unwrap_err().to_string();
    assert!(refused.contains("another") && refused.contains("fast.json"), "{refused}");
    fs::rename(dir.path(), other).unwrap();
    fs::rename(&aside, dir.path()).unwrap();
    assert_eq!(pool.get(Key::Name("a")).unwrap(), made);
    // The configuration names another directory.
    let elsewhere = FilePool::new("fast", aside, limits(), memory, None);
    fs::create_dir(state.path().join("aside")).unwrap();
    assert_eq!(elsewhere.list(None, usize::MAX).unwrap(), []);
}

#[test]
fn a_pool_of_an_older_program_gets_its_identity() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let made = pool(dir.path()).create(&new("a")).unwrap();
    let identity = dir.path().join(identity::NAME);
    fs::remove_file(&identity).unwrap();
    let memory = state.path().join("pools/fast.json");
    let state = Some(state.path().to_owned());
    let pool = FilePool::new("fast", dir.path().to_owned(), limits(), state, None);
    assert_eq!(pool.list(None, usize::MAX).unwrap(), [made]);
    assert!(!identity.exists(), "to list changes nothing");
    pool.create(&new("b")).unwrap();
    assert!(identity.exists() && memory.exists());
}

/// A pool that nodes share, of the node with this state.
fn shared(dir: &Path, state: &Path) -> Arc<FilePool> {
    let state = Some(state.to_owned());
    FilePool::new("shared", dir.to_owned(), limits(), state, Some(|_| Ok(())))
}

#[test]
fn rule_37_only_the_last_writer_of_a_shared_volume_may_go_on_to_write() {
    let [dir, one, other] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (a, b) = (shared(dir.path(), one.path()), shared(dir.path(), other.path()));
    assert!(!a.info().is_local, "every node reaches it");
    let uuid = a.create(&new("x")).unwrap().record.uuid;
    a.begin_writing(uuid).unwrap();
    let open = a.open_alone(uuid).unwrap();
    a.check_writer(uuid).unwrap();
    assert_eq!(b.check_writer(uuid).unwrap_err().kind(), ErrorKind::Fenced);
    assert_eq!(b.begin_writing(uuid).unwrap_err().kind(), ErrorKind::Busy);
    drop(open);
    // Its daemon has died, and has come back.
    shared(dir.path(), one.path()).check_writer(uuid).unwrap();
    b.begin_writing(uuid).unwrap();
    let fenced = a.check_writer(uuid).unwrap_err();
    assert!(fenced.kind() == ErrorKind::Fenced && fenced.to_string().contains("used it since"));
    let without_state = FilePool::new("x", dir.path().to_owned(), limits(), None, a.shared);
    assert_eq!(without_state.begin_writing(uuid).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn rule_36_rule_38_a_publication_of_a_shared_volume_ends_while_nothing_has_it_open() {
    let [dir, one, other] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (a, b) = (shared(dir.path(), one.path()), shared(dir.path(), other.path()));
    let uuid = a.create(&new("x")).unwrap().record.uuid;
    let wanted = |node: &str, mode: AccessMode| Publication {
        node: node.to_owned(),
        epoch: 0,
        read_only: mode.is_reader_only(),
        mode,
        block: false,
        claim: String::new(),
    };
    assert_eq!(a.publish(uuid, &wanted("n1", AccessMode::SingleNodeWriter), false).unwrap(), 1);
    a.begin_writing(uuid).unwrap();
    let open = a.open_alone(uuid).unwrap();
    assert_eq!(b.unpublish(uuid, Some("n1"), false).unwrap_err().kind(), ErrorKind::Busy);
    drop(open);
    b.unpublish(uuid, Some("n1"), false).unwrap();
    assert_eq!(a.check_writer(uuid).unwrap_err().kind(), ErrorKind::Fenced, "it has ended");
    // Readers do not wait for each other.
    for node in ["n1", "n2"] {
        b.publish(uuid, &wanted(node, AccessMode::MultiNodeReaderOnly), false).unwrap();
    }
    let _open = b.open_alone(uuid).unwrap();
    b.unpublish(uuid, Some("n1"), true).unwrap();
}

/// A node whose lock a file server has given to another one cannot write to the lock's file.
#[test]
fn a_node_that_has_lost_the_lock_makes_and_removes_nothing() {
    let [dir, state] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let pool = shared(dir.path(), state.path());
    let uuid = ["dying", "made"].map(|name| pool.create(&new(name)).unwrap().record.uuid);
    // One was being deleted, and another node has made the other: it had reserved the name only.
    pool.update(uuid[0], &mut |record| {
        record.deleting = true;
        Ok(())
    })
    .unwrap();
    let record = pool.layout.record(uuid[1]);
    let other = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    let before = files(dir.path());
    fs::remove_file(pool.layout.lock()).unwrap();
    std::os::unix::fs::symlink("/dev/full", pool.layout.lock()).unwrap();
    for name in ["dying", "new", "made"] {
        assert_eq!(pool.create(&sized(name, 8 * MIB, 0)).unwrap_err().kind(), ErrorKind::NoSpace);
    }
    assert_eq!(pool.delete(uuid[0]).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(files(dir.path()), before);
    fs::write(&record, other).unwrap();
    assert_eq!(pool.get(Key::Name("made")).unwrap().size, 4 * MIB, "its image is as it was");
}

#[test]
fn rule_03_a_volume_whose_image_is_gone_is_not_taken_for_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let uuid = pool.create(&new("a")).unwrap().record.uuid;
    fs::remove_file(pool.layout.image(uuid)).unwrap();
    let refused = pool.create(&new("a")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert!(refused.to_string().contains("restore the image from a backup"), "{refused}");
    pool.delete(uuid).unwrap();
    pool.create(&new("a")).unwrap();
}

#[test]
fn files_of_others_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["disk.img", "notes.json", "0190.img"] {
        fs::write(dir.path().join(name), "mine").unwrap();
    }
    let pool = pool(dir.path());
    let uuid = pool.create(&new("a")).unwrap().record.uuid;
    assert_eq!(pool.list(None, usize::MAX).unwrap().len(), 1);
    pool.delete(uuid).unwrap();
    assert_eq!(files(dir.path()).len(), 3);
}

#[test]
fn a_damaged_record_is_an_error_and_its_image_stays() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(dir.path());
    let uuid = pool.create(&new("a")).unwrap().record.uuid;
    fs::write(pool.layout.record(uuid), "{").unwrap();
    assert_eq!(pool.get(Key::Uuid(uuid)).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(pool.create(&new("a")).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(pool.delete(uuid).unwrap_err().kind(), ErrorKind::Corrupt);
    // It is not left out of a list, where it would look deleted.
    let [listed] = &pool.list(None, usize::MAX).unwrap()[..] else { panic!("one volume") };
    assert_eq!((listed.record.uuid, listed.size), (uuid, 4 * MIB));
    let trouble = listed.trouble.as_ref().unwrap();
    assert!(trouble.contains("damaged") && pool.layout.image(uuid).exists(), "{trouble}");
    let pool = self::pool(dir.path());
    let missing = pool.create(&new("b")).unwrap().record.uuid;
    fs::remove_file(pool.layout.image(missing)).unwrap();
    assert!(pool.get(Key::Uuid(missing)).unwrap().trouble.unwrap().contains("image"));
}

#[test]
fn an_image_with_data_stays_when_its_record_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let made = pool(dir.path()).create(&new("a")).unwrap();
    let [image, record] =
        ["img", "json"].map(|kind| dir.path().join(format!("{}.{kind}", made.record.uuid)));
    fs::write(&image, [7; 4096]).unwrap();
    File::open(&image).unwrap().sync_all().unwrap();
    let saved = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    // It is looked at among what crashes have left.
    pool(dir.path()).sweep().unwrap();
    pool(dir.path()).create(&new("b")).unwrap();
    let refused = pool(dir.path()).create(&new("a")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert_eq!(fs::read(&image).unwrap(), [7; 4096]);
    fs::write(&record, saved).unwrap();
    assert_eq!(pool(dir.path()).get(Key::Name("a")).unwrap().size, 4096);
}

#[test]
fn a_volume_is_known_by_its_text() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool(&dir.path().join("odd ? näme"));
    let uuid = Uuid::now_v7();
    let text = pool.text(uuid);
    assert_eq!(pool.uuid_of_text(&text), Some(uuid), "{text}");
    assert_eq!(pool.uuid_of_text(&text.replace("odd", "other")), None);
    assert_eq!(pool.uuid_of_text("/a.img"), None);
}
