//! The ring floor: the least that a server on io_uring with a volume in memory does. It takes
//! requests as they come, without checks, histograms or clocks per request, one thread and one
//! ring a connection.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sheave_core::{Buf, Payload, Segment};
use sheave_proto::wire::{command, header_len};
use sheave_proto::{ReplyStyle, Request, reply};
use sheave_ring::{Event, Ring, RingConfig, SendBatch, Socket, copy_in, probe};

use super::{FloorArgs, RECEIVE_SIZE, accept, handshake};

/// A write with more payload to come than this receives it in place.
const IN_PLACE_MIN: usize = 16 << 10;
/// How often a poll looks at the ring between two looks at the clock.
const LOOKS_PER_CLOCK: usize = 16;

/// Serves until it is killed.
///
/// # Errors
/// When it cannot listen, or io_uring cannot be had.
pub(crate) fn serve(args: &FloorArgs) -> Result<()> {
    let probe = probe().context("io_uring")?;
    let (size, poll) = (args.size.0, args.poll());
    let volume = Buf::zeroed(usize::try_from(size)?);
    accept(args, move |mut socket| {
        handshake::serve(&mut socket, size)?;
        let config = RingConfig {
            receive_buffers_min: 2,
            receive_buffers_max: 2,
            receive_buffer_len: RECEIVE_SIZE,
            registered_max: 1,
            ..RingConfig::default()
        };
        let ring = Ring::new(&probe, config).context("io_uring")?;
        Connection::new(ring, socket, volume.clone()).serve(poll)
    })
}

struct Connection {
    ring: Ring,
    socket: Socket,
    volume: Buf,
    batch: Option<Box<SendBatch>>,
    /// The start of a request whose rest has not arrived.
    partial: Vec<u8>,
    /// A write whose payload has not arrived in full.
    landing: Option<Landing>,
}

struct Landing {
    cookie: u64,
    place: Payload,
    filled: usize,
}

impl Connection {
    fn new(mut ring: Ring, socket: UnixStream, volume: Buf) -> Self {
        let socket = ring.adopt(socket.into());
        let batch = Some(Box::default());
        Self { ring, socket, volume, batch, partial: Vec::new(), landing: None }
    }

    /// One thing at a time: receive, answer all, send, receive.
    fn serve(mut self, poll: Duration) -> Result<()> {
        self.ring.recv(&self.socket, 0);
        loop {
            self.wait(poll)?;
            while let Some(event) = self.ring.next_event() {
                match event {
                    Event::Received { result, .. } => {
                        let Some(mut received) = result? else { return Ok(()) };
                        let goes_on = self.parse(received.bytes())?;
                        self.ring.give_back(received);
                        if !goes_on {
                            return Ok(());
                        }
                        self.send_or_receive();
                    }
                    Event::Landed { result, .. } => {
                        let count = result?;
                        if count == 0 {
                            return Ok(());
                        }
                        self.land(count);
                        self.send_or_receive();
                    }
                    Event::Sent { result, mut batch, .. } => {
                        result?;
                        if batch.unsent() > 0 {
                            self.ring.send(&self.socket, batch, 0);
                        } else {
                            batch.clear(drop);
                            self.batch = Some(batch);
                            self.receive();
                        }
                    }
                    Event::NoBuffer { .. } => self.receive(),
                    Event::Watched { .. } | Event::File { .. } | Event::Command { .. } => {}
                }
            }
        }
    }

    /// Looks for a completion for a while, then sleeps.
    fn wait(&mut self, poll: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                if self.ring.poll()? {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= poll {
                return Ok(self.ring.wait(None)?);
            }
        }
    }

    fn send_or_receive(&mut self) {
        match self.batch.take_if(|batch| !batch.is_empty()) {
            Some(batch) => self.ring.send(&self.socket, batch, 0),
            None => self.receive(),
        }
    }

    fn receive(&mut self) {
        match &self.landing {
            Some(Landing { place, filled, .. }) if place.len() - filled > IN_PLACE_MIN => {
                self.ring.recv_into(&self.socket, place.clone(), *filled, 0);
            }
            _ => self.ring.recv(&self.socket, 0),
        }
    }

    /// Answers every request in `bytes`; false after a good-bye.
    fn parse(&mut self, bytes: &[u8]) -> Result<bool> {
        let mut rest = bytes;
        loop {
            if let Some(Landing { place, filled, .. }) = &self.landing {
                let (now, later) = rest.split_at(rest.len().min(place.len() - filled));
                copy_in(place, *filled, now);
                rest = later;
                self.land(now.len());
                if self.landing.is_some() {
                    return Ok(true);
                }
            }
            let missing = header_len::REQUEST - self.partial.len();
            if rest.len() < missing {
                self.partial.extend_from_slice(rest);
                return Ok(true);
            }
            let (now, later) = rest.split_at(missing);
            rest = later;
            let request = if self.partial.is_empty() {
                Request::decode(ReplyStyle::Simple, now)?
            } else {
                self.partial.extend_from_slice(now);
                let request = Request::decode(ReplyStyle::Simple, &self.partial)?;
                self.partial.clear();
                request
            };
            if request.command == command::DISC {
                return Ok(false);
            }
            self.answer(&request)?;
        }
    }

    fn answer(&mut self, request: &Request) -> Result<()> {
        let cookie = request.cookie;
        match request.command {
            command::READ => {
                let data = self.place(request)?;
                if let Some(batch) = &mut self.batch {
                    batch.head(|out| reply::simple(out, cookie, None));
                    batch.segment(Segment::Data(data));
                }
            }
            command::WRITE => {
                let place = self.place(request)?.into();
                self.landing = Some(Landing { cookie, place, filled: 0 });
            }
            _ => self.done(cookie),
        }
        Ok(())
    }

    /// Notes that `count` more bytes of the write's payload are in place.
    fn land(&mut self, count: usize) {
        if let Some(landing) = &mut self.landing {
            landing.filled += count;
            if landing.filled == landing.place.len() {
                let cookie = landing.cookie;
                self.landing = None;
                self.done(cookie);
            }
        }
    }

    fn done(&mut self, cookie: u64) {
        if let Some(batch) = &mut self.batch {
            batch.head(|out| reply::simple(out, cookie, None));
        }
    }

    /// The memory of a request. The one check there is: without it a client could crash us.
    fn place(&self, request: &Request) -> Result<Buf> {
        let (skip, len) = (usize::try_from(request.offset)?, usize::try_from(request.length)?);
        let is_inside = skip.checked_add(len).is_some_and(|end| end <= self.volume.len());
        anyhow::ensure!(is_inside, "a request outside of the volume");
        Ok(self.volume.slice(skip, len))
    }
}
