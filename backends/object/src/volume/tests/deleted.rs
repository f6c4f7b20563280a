//! Readings that have found their blocks in objects which are deleted then.

use super::*;
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::Reach;
use crate::front::{By, Fetch};
use crate::ids::{Epoch, Seq};
use crate::lineage::Lineage;
use crate::map::Found;
use crate::sources::Sources;
use crate::worker::again::fetch;

fn wait_until(is_so: impl Fn() -> bool) {
    let by = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < by, "it never is so");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_reading_of_a_deleted_object_looks_the_map_up_again() {
    let place = Place::new();
    let volume = place.open("a", false);
    let engine = &volume.opened.engine;
    let id = block_on(open::find(&place.requests())).unwrap().volume;
    let sources = Sources::of_volume(&place.requests(), id);
    let reach = Reach { epoch: Epoch(1), first: Seq(1) };
    let fetcher = Fetcher::of_command(&sources, Lineage::default().with(reach));
    let mut driver = ops::driver(&volume);
    let mut write_all = |byte: u8| {
        driver.run_one(write(7, byte)).unwrap();
        wait_until(|| engine.with(|front| front.lag_bytes()) == 0);
    };
    let span = Span { start: 7, blocks: 1 };
    write_all(1);
    let before = engine.with(|front| front.cover(span));
    let [(_, Found::At(old))] = before[..] else { panic!("{before:?}") };
    // Each write is an object, of which the map needs only the last one.
    (2..60).for_each(&mut write_all);
    wait_until(|| engine.status().deleted_objects > 20);
    let by = By::Place(old);
    let stored = block_on(fetcher.fetch(Lba(7), 1, old));
    assert!(stored.unwrap_err().to_string().contains("missing"));
    let read = |by| block_on(fetch(engine, &fetcher, &Fetch { id: 0, span, by }));
    assert_eq!(read(by).unwrap()[0], 59);
    assert_eq!(read(By::Map).unwrap()[0], 59);
    // What the map needs is not there: that is an error.
    std::fs::remove_dir_all(place.dir.path().join("store").join("log")).unwrap();
    for by in [By::Place(old), By::Map] {
        let error = read(by).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("missing"));
    }
}
