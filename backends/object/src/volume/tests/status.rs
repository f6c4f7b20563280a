//! What is said of an open volume.

use super::*;
use crate::clock::Clock as _;
use crate::status::Status;

/// Waits until the status of a volume is as it should be.
fn wait_for(volume: &ObjectVolume, is_so: impl Fn(&Status) -> bool) -> Status {
    let by = Instant::now() + Duration::from_secs(60);
    loop {
        let status = volume.opened.engine.status();
        if is_so(&status) {
            return status;
        }
        assert!(Instant::now() < by, "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_status_says_what_the_store_lacks_and_what_writes_wait_for() {
    let place = Place::new();
    let volume = place.open("a", false);
    let status = volume.opened.engine.status();
    assert_eq!((status.lag_bytes, status.lag_writes, status.lag_ms), (0, 0, 0));
    assert!(status.requests.list.answered > 0 && status.requests.get.bytes > 0, "{status:?}");
    let created = status.requests.create.answered;
    place.is_away.store(true, Relaxed);
    let engine = PlainEngine::new(64);
    let mut steps = Steps { backend: volume.backend().unwrap(), engine, ended: Vec::new() };
    (0..100).for_each(|tag| steps.submit(write(tag % BLOCKS, 1), tag));
    assert!(steps.until(|ended| ended.len() >= 30));
    let status = wait_for(&volume, |status| {
        let why = status.waits_for.as_deref().unwrap_or_default();
        why.starts_with("the journal is full") && why.ends_with("the store is away: away")
    });
    assert!(status.lag_bytes > 0 && status.lag_writes >= 30 && status.lag_ms > 0, "{status:?}");
    assert!(status.oldest_request_ms.is_some() && status.requests.create.failed > 0);
    assert_eq!(status.journal_bytes, status.journal_bytes_max);
    place.is_away.store(false, Relaxed);
    assert!(steps.until(|ended| ended.len() == 100));
    let status = wait_for(&volume, |status| status.lag_bytes == 0);
    assert_eq!((status.lag_writes, status.lag_ms, status.waits_for), (0, 0, None));
    assert!(status.requests.create.answered > created);
    assert!(status.requests.create.bytes >= 100 * BLOCK_BYTES);
}

#[test]
fn trims_have_no_bytes_that_the_store_could_lack() {
    let place = Place::new();
    let volume = place.open("a", false);
    place.is_away.store(true, Relaxed);
    ops::driver(&volume).run_one(ops::trim(0, BLOCKS * BLOCK_BYTES)).unwrap();
    ops::driver(&volume).run_one(write(3, 1)).unwrap();
    let status = volume.opened.engine.status();
    assert_eq!((status.lag_bytes, status.lag_writes), (BLOCK_BYTES, 2));
    place.is_away.store(false, Relaxed);
}

#[test]
fn a_store_that_does_not_answer_is_noticed() {
    let place = Place::new();
    let volume = place.open("a", false);
    place.is_hung.store(true, Relaxed);
    ops::driver(&volume).run_one(write(1, 1)).unwrap();
    let engine = &volume.opened.engine;
    wait_for(&volume, |status| status.oldest_request_ms.is_some_and(|ms| ms > 0));
    let later = SystemClock.now_ms() + 20_000;
    let why = engine.status_at(later).waits_for.expect("it waits for the store");
    assert!(why.starts_with("the store has not answered a request for 2"), "{why}");
    let mut is_silent = false;
    worker::note_silence(engine, later, &mut is_silent);
    assert!(is_silent);
    place.is_hung.store(false, Relaxed);
    let status = wait_for(&volume, |status| status.oldest_request_ms.is_none());
    assert_eq!(status.waits_for, None);
    worker::note_silence(engine, later, &mut is_silent);
    assert!(!is_silent);
}
