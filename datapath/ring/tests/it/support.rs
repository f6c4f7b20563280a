//! A ring with one peer, and what both say to each other.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sheave_core::{Buf, Payload, Segment};
use sheave_ring::{Event, Received, Ring, RingConfig, SendBatch, Socket, probe};

/// No event comes for this long, even on a slow machine with other work: it never will.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);

/// A small ring; `None` where the kernel has none, since there is nothing to test then.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
pub(crate) fn ring(config: RingConfig) -> Option<Ring> {
    let probe = probe().inspect_err(|error| eprintln!("skipped, no io_uring: {error}")).ok()?;
    Some(Ring::new(&probe, config).expect("a ring where the probe had one"))
}

pub(crate) fn small() -> RingConfig {
    RingConfig {
        receive_buffers_min: 2,
        receive_buffers_max: 2,
        receive_buffer_len: 4096,
        ..RingConfig::default()
    }
}

/// A socket of the ring's and its other end, which gives up after [`TIMEOUT`].
pub(crate) fn pair(ring: &mut Ring) -> (Socket, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(TIMEOUT)).unwrap();
    theirs.set_write_timeout(Some(TIMEOUT)).unwrap();
    (ring.adopt(ours.into()), theirs)
}

/// The next event.
pub(crate) fn next(ring: &mut Ring) -> Event {
    let start = Instant::now();
    loop {
        if let Some(event) = ring.next_event() {
            return event;
        }
        assert!(start.elapsed() < TIMEOUT, "no event came");
        ring.wait(Some(Duration::from_millis(100))).unwrap();
    }
}

/// The next event, which is one of these.
pub(crate) fn received(ring: &mut Ring) -> Option<Received> {
    match next(ring) {
        Event::Received { result, .. } => result.unwrap(),
        other => panic!("{}", name(&other)),
    }
}

pub(crate) fn landed(ring: &mut Ring) -> (usize, Payload) {
    match next(ring) {
        Event::Landed { result, payload, .. } => (result.unwrap(), payload),
        other => panic!("{}", name(&other)),
    }
}

pub(crate) fn sent(ring: &mut Ring) -> Box<SendBatch> {
    match next(ring) {
        Event::Sent { result, batch, .. } => {
            result.unwrap();
            batch
        }
        other => panic!("{}", name(&other)),
    }
}

pub(crate) fn name(event: &Event) -> &'static str {
    match event {
        Event::Received { .. } => "received",
        Event::NoBuffer { .. } => "no buffer",
        Event::Landed { .. } => "landed",
        Event::Sent { .. } => "sent",
        Event::File { .. } => "file",
        Event::Watched { .. } => "watch",
        Event::Command { .. } => "command",
    }
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// A payload of zero bytes in pieces of these lengths, none of them at the start of a page.
pub(crate) fn pieces(lens: &[usize]) -> Payload {
    let mut payload = Payload::new();
    for len in lens {
        payload.push(Segment::Data(Buf::zeroed(len + 3).slice(3, *len)));
    }
    payload
}
