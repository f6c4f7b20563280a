//! Snapshots, ancestors and pins as they are stored.

use super::*;

/// One with all that a root can have.
fn root_of_clone() -> Root {
    let owner = |end, volume, name: &str| Owner {
        end: Seq(end),
        volume: VolumeId([volume; 16]),
        name: name.to_owned(),
    };
    let owners = vec![owner(3, 5, "golden"), owner(40, 6, "der Größere")];
    let added = vec![snapshot(4, 30, 31), snapshot(7, 42, 44)];
    let snapshots =
        SnapshotNews { count: 3, last: 9, added, removed: vec![1, 2], deleting: vec![3, 7] };
    Root { owners, snapshots, ..root() }
}

/// One of all up to an object, whose directory is in another one.
pub(super) fn snapshot(id: u64, seq: u64, directory: u64) -> Snapshot {
    Snapshot {
        id,
        name: format!("daily.{id}"),
        committed: Committed { seq: Seq(seq), lsn: Lsn(900 + id) },
        checkpoint: Some(CheckpointPlace {
            directory: FramePlace { seq: Seq(directory), at: 152, bytes: 99 },
            reach: Reach { epoch: Epoch(5), first: Seq(2) },
        }),
        size: 1 << 18,
        at_ms: 1_800_000_000_000,
    }
}

#[test]
fn snapshots_and_ancestors_are_in_the_root_as_in_the_drawing() {
    let bytes = root_of_clone().encode();
    assert_eq!(bytes[170 - 4..][..6], [1, 1, 1, 0, 72, 0], "settings, and the length of a key");
    let owners = &bytes[172 + 72..];
    assert_eq!((owners[0], owners[2], owners[10], owners[26]), (2, 3, 5, 6));
    assert_eq!(&owners[28..34], b"golden");
    let snapshots = &owners[2 + 26 + 6 + 26 + 13..];
    assert_eq!((snapshots[0], snapshots[8], snapshots[12]), (9, 3, 2));
    assert_eq!((snapshots[14], snapshots[22], snapshots[38]), (4, 30, 31));
    assert_eq!(&snapshots[14 + 74..][..7], b"daily.4");
    assert_eq!(Root::decode(&bytes), Ok(root_of_clone()));
}

#[test]
fn a_root_has_room_for_the_longest_names_of_nodes() {
    let mut root = root_of_clone();
    while root.fits(0) {
        root.snapshots.added.push(snapshot(8, 42, 44));
    }
    root.snapshots.added.pop();
    (root.node, root.last.node) = ("n".repeat(NODE_BYTES_MAX), "n".repeat(NODE_BYTES_MAX));
    assert!(ROOT_BYTES_MAX - (root.encode().len() as u64) < 100);
}

#[test]
fn snapshots_of_a_root_continue_those_of_its_checkpoint() {
    let news = root_of_clone().snapshots;
    let ids = |all: Option<Vec<Snapshot>>| {
        all.map(|all| all.iter().map(|snapshot| snapshot.id).collect::<Vec<_>>())
    };
    let of = |ids: &[u64]| ids.iter().map(|id| snapshot(*id, 2, 3)).collect::<Vec<_>>();
    assert_eq!(ids(news.with(of(&[1, 2, 3]))), Some(vec![3, 4, 7]));
    assert_eq!(news.with(of(&[1, 3])), None, "one that is deleted was not there");
    assert_eq!(news.with(of(&[1, 2])), None, "one is missing");
    assert_eq!(news.with(of(&[1, 2, 6])), None, "not in order");
    let checkpoint = news.behind_checkpoint();
    assert_eq!(ids(checkpoint.with(of(&[3, 4, 7]))), Some(vec![3, 4, 7]));
}

#[test]
fn names_that_cannot_be_are_refused() {
    for name in ["a", "daily.2026-12-01", "_", &"x".repeat(128)] {
        assert!(is_snapshot_name(name), "{name}");
    }
    for name in ["", ".a", "a b", "a/b", "é", "a@b", &"x".repeat(129)] {
        assert!(!is_snapshot_name(name), "{name}");
    }
}

#[test]
fn a_pin_is_read_back_and_no_other_bytes_are() {
    let pin = Pin { clone: VolumeId([7; 16]), name: "clone".to_owned() };
    let bytes = pin.encode();
    assert_eq!(bytes.len(), 16 + 16 + 2 + 5 + 4);
    assert_eq!(Pin::decode(&bytes), Ok(pin));
    for name in ["", "..", "a/b", "a\nb"] {
        let pin = Pin { clone: VolumeId([7; 16]), name: name.to_owned() };
        assert!(Pin::decode(&pin.encode()).is_err(), "{name}");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(Pin::decode(&damaged).is_err(), "{at}");
    }
    assert_eq!(keys::pin(10, VolumeId([7; 16])), format!("{}{}", keys::pins(10), "07".repeat(16)));
}

#[test]
fn snapshots_and_ancestors_that_contradict_one_another_are_refused() {
    let wrong: [fn(&mut Root); 13] = [
        |root| root.owners[1].end = Seq(41),
        |root| root.owners[1].end = Seq(3),
        |root| root.owners[0].end = Seq(1),
        |root| root.owners[0].name = "..".to_owned(),
        |root| root.snapshots.count = 1,
        |root| root.snapshots.last = 6,
        |root| root.snapshots.added[1].id = 4,
        |root| root.snapshots.added[1].name = "a/b".to_owned(),
        |root| root.snapshots.added[1] = snapshot(7, 44, 43),
        |root| root.snapshots.added[1] = snapshot(7, 44, 45),
        |root| root.snapshots.added[1].checkpoint = None,
        |root| root.snapshots.removed[0] = 4,
        |root| root.snapshots.deleting[0] = 10,
    ];
    for (index, change) in wrong.into_iter().enumerate() {
        let mut root = root_of_clone();
        change(&mut root);
        assert!(matches!(Root::decode(&root.encode()), Err(Wrong::Damaged(_))), "{index}");
    }
}
