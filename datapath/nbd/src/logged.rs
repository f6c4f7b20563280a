//! A session that tells the log whose it is.

use std::io;

use sheave_core::{Nanos, Outcome, Payload, printable};
use sheave_ring::SendBatch;
use sheave_shard::{Cx, NextRead, Session};
use sheave_telemetry::Recorder;

use crate::gate::Place;
use crate::session::NbdSession;

/// An [`NbdSession`] with the names of both ends.
pub(crate) struct LoggedSession {
    session: NbdSession,
    peer: String,
    export: String,
    /// Free for another client when this session is dropped.
    _place: Place,
}

impl LoggedSession {
    pub(crate) fn new(session: NbdSession, peer: String, export: String, place: Place) -> Self {
        Self { session, peer, export, _place: place }
    }
}

impl Session for LoggedSession {
    fn received(&mut self, bytes: &mut [u8], cx: &mut Cx<'_>) {
        self.session.received(bytes, cx);
    }

    fn landed(&mut self, payload: Payload, count: usize, cx: &mut Cx<'_>) {
        self.session.landed(payload, count, cx);
    }

    fn completed(&mut self, request: u32, outcome: Outcome, cx: &mut Cx<'_>) {
        self.session.completed(request, outcome, cx);
    }

    fn retry(&mut self, cx: &mut Cx<'_>) {
        self.session.retry(cx);
    }

    fn gather(&mut self, batch: &mut SendBatch, now: Nanos, recorder: &Recorder) {
        self.session.gather(batch, now, recorder);
    }

    fn sent(&mut self, bytes: usize) {
        self.session.sent(bytes);
    }

    fn next_read(&mut self) -> NextRead {
        self.session.next_read()
    }

    fn ended(&mut self, error: Option<&io::Error>) {
        let (peer, export) = (&self.peer, printable(&self.export));
        let span = tracing::info_span!("connection", %peer, %export);
        span.in_scope(|| self.session.ended(error));
    }

    fn in_flight(&self) -> usize {
        self.session.in_flight()
    }

    fn is_stalled(&self) -> bool {
        self.session.is_stalled()
    }

    fn shut_down(&mut self) {
        self.session.shut_down();
    }

    fn closed(&mut self, recorder: &Recorder) {
        self.session.closed(recorder);
        let (peer, export) = (&self.peer, printable(&self.export));
        tracing::debug!(%peer, %export, "connection closed");
    }
}
