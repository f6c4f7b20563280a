//! Requests that make no progress end.

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
