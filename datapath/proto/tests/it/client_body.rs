//! The fuzzers' body for the client's transmission phase; see `bodies.rs`.

use sheave_proto::wire::{command, command_flag};
use sheave_proto::{
    Answer, Client, ClientEvent, ClientNegotiated, ContextSet, REPLY_LEN_MAX, ReplyStyle, Request,
    ServerError, transmission_flags,
};

use crate::bodies::Source;

/// A request in flight, as the fuzzer's client sees it.
#[derive(Debug)]
struct Asked {
    request: Request,
    /// Start and end of ranges that have arrived.
    arrived: Vec<(usize, usize)>,
}

impl Asked {
    fn arrive(&mut self, at: usize, len: usize) {
        let end = at + len;
        assert!(self.request.command == command::READ && len > 0);
        assert!(end as u64 <= self.request.length, "inside of the read");
        let is_free = |(start, stop): &(usize, usize)| end <= *start || *stop <= at;
        assert!(self.arrived.iter().all(is_free), "once");
        self.arrived.push((at, end));
    }
}

/// A client in transmission survives any server: no byte of a read lands outside of it or twice,
/// and it does not matter how the bytes are cut and where they are received.
pub(crate) fn client_transmission(data: &[u8]) -> bool {
    let mut source = Source(data);
    let (style, volume) = (source.style(), source.volume());
    let contexts = [(1, "base:allocation".to_owned()), (7, "x:other".to_owned())];
    let negotiated = ClientNegotiated {
        style,
        size: source.size(),
        transmission_flags: transmission_flags(&volume, style, ContextSet::EMPTY),
        block: volume.block,
        block_sizes_told: true,
        contexts: contexts.into(),
        name: None,
        description: None,
        tls: false,
    };
    let requests: Vec<_> = (0..1 + source.byte() % 4)
        .map(|_| {
            let flags = u16::from(source.byte());
            let kinds = [command::READ, command::BLOCK_STATUS, command::WRITE];
            let command = kinds[source.byte() as usize % kinds.len()];
            let offset = source.word() >> (source.byte() % 64);
            let length = source.word() >> (source.byte() % 64);
            let length = if style == ReplyStyle::Extended { length } else { length & 0xffff_ffff };
            Request { cookie: 0, flags, command, offset, length }
        })
        .collect();
    let split = usize::from(source.byte()).max(1);
    let whole = run_transmission(&negotiated, &requests, source.0, source.0.len().max(1), false);
    for in_place in [false, true] {
        let cut = run_transmission(&negotiated, &requests, source.0, split, in_place);
        assert_eq!(whole, cut, "splits change nothing");
    }
    whole.iter().any(|line| line.starts_with("Cookie"))
}

/// The outcomes of requests and connection.
fn run_transmission(
    negotiated: &ClientNegotiated,
    requests: &[Request],
    mut wire: &[u8],
    split: usize,
    in_place: bool,
) -> Vec<String> {
    let mut client = Client::new(negotiated, requests.len());
    for request in requests {
        let asked = Asked { request: *request, arrived: Vec::new() };
        client.submit_request(*request, asked, &mut Vec::new()).expect("there is room");
    }
    assert!(!client.has_room());
    let (mut log, mut input) = (Vec::new(), Vec::new());
    loop {
        let (consumed, event) = match client.step(&input) {
            Ok(step) => step,
            Err(error) => {
                assert_eq!(client.step(&input).unwrap_err(), error);
                assert_eq!(client.drain().count() + log.len(), requests.len());
                log.push(error.to_string());
                return log;
            }
        };
        let mut needs_more = false;
        match event {
            ClientEvent::NeedMore(needed) => {
                assert!(needed > input.len() - consumed && needed <= REPLY_LEN_MAX);
                needs_more = true;
            }
            ClientEvent::Data { state, at, bytes, .. } => state.arrive(at, bytes.len()),
            ClientEvent::Zeroes { state, at, len, .. } => state.arrive(at, len),
            ClientEvent::Done { cookie, state, outcome } => {
                check_outcome(&state, &outcome);
                log.push(format!("{cookie:?} {outcome:?}"));
            }
        }
        input.drain(..consumed);
        if needs_more && wire.is_empty() {
            assert_eq!(client.in_flight() + log.len(), requests.len());
            return log;
        }
        if needs_more {
            let len = split.min(wire.len());
            match client.payload().filter(|_| in_place) {
                Some(place) => {
                    assert!(input.is_empty());
                    let len = len.min(place.len);
                    place.state.arrive(place.at, len);
                    client.payload_received(len);
                    wire = &wire[len..];
                }
                None => {
                    input.extend_from_slice(&wire[..len]);
                    wire = &wire[len..];
                }
            }
        }
    }
}

fn check_outcome(asked: &Asked, outcome: &Result<Answer, ServerError>) {
    let request = &asked.request;
    match outcome {
        Ok(Answer::Extents(extents)) => {
            assert_eq!(request.command, command::BLOCK_STATUS);
            let has_filter = request.flags & command_flag::PAYLOAD_LEN != 0;
            let total: u128 = extents.iter().map(|extent| u128::from(extent.len)).sum();
            assert!(!extents.is_empty() && extents.iter().all(|extent| extent.len > 0));
            assert!(has_filter || total <= request.length.into());
        }
        Ok(Answer::Done) => {
            let total: usize = asked.arrived.iter().map(|(start, end)| end - start).sum();
            assert_ne!(request.command, command::BLOCK_STATUS);
            assert!(request.command != command::READ || total as u64 == request.length);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
