//! Requests that make no progress end, and writes do not wait for ever.

use super::*;

/// A driver of a volume with a mishap for each request to the journal; it counts them, and panics
/// when there are so many that they have no bound.
fn driver_with(
    volume: &ObjectVolume,
    mut mishap_of: impl FnMut(&IoRequest) -> Mishap + Send + 'static,
) -> Driver<PlainEngine> {
    let mut count = 0;
    let engine = PlainEngine::new(8).with_mishaps(move |request| {
        count += 1;
        assert!(count < 1000, "a request is started again for ever");
        mishap_of(request)
    });
    Driver::new(volume.backend().unwrap(), engine)
}

#[test]
fn a_write_that_moves_no_byte_fails() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut driver = driver_with(&volume, |_| Mishap::Short(0));
    assert!(is_kind(driver.run_one(write(1, 1)), ErrorKind::Io));
    assert!(volume.has_lost_data_itself());
}

#[test]
fn a_request_that_is_always_interrupted_fails() {
    let place = Place::new();
    let volume = place.open("a", false);
    let mut driver = driver_with(&volume, |request| match request {
        IoRequest::Read { .. } => Mishap::Errno(nix::libc::EINTR),
        _ => Mishap::None,
    });
    place.is_away.store(true, Relaxed);
    assert!(matches!(driver.run_one(write(1, 1)), Ok(Reply::Done)));
    assert!(driver.run_one(read(1)).is_err());
    assert!(!volume.has_lost_data_itself());
    place.is_away.store(false, Relaxed);
}

#[test]
fn writes_go_on_when_nothing_holds_the_segments_any_more() {
    let place = Place::new();
    let volume = place.open("a", false);
    let engine = &volume.opened.engine;
    place.is_away.store(true, Relaxed);
    let plain = PlainEngine::new(64);
    let mut steps = Steps { backend: volume.backend().unwrap(), engine: plain, ended: Vec::new() };
    (0..100).for_each(|tag| steps.submit(write(tag % BLOCKS, 1), tag));
    assert!(steps.until(|ended| ended.len() >= 30));
    // As long syncs do.
    let held: Vec<_> =
        (0..9).filter_map(|number| engine.with(|front| front.segment(number))).collect();
    assert_eq!(held.len(), 3);
    place.is_away.store(false, Relaxed);
    assert!(steps.until(|_| engine.status().lag_bytes == 0));
    // The store has all that was written, so no commit makes room any more.
    assert!(steps.ended.len() < 100);
    drop(held);
    assert!(steps.until(|ended| ended.len() == 100));
}
