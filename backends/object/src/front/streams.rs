//! Readings that go on where the last one ended, and what they will want next.

use crate::extents::Span;

/// Streams that are known at the same time.
const STREAMS: usize = 16;
/// A reading goes on with a stream if it begins so near to its end, in blocks: several that are
/// under way at the same time may change their order.
const SLACK_BLOCKS: u64 = 64;
/// Readings that make a stream.
const READINGS_MIN: u32 = 4;

/// Finds streams.
#[derive(Debug)]
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    /// Counts readings.
    time: u64,
    /// The most blocks that are wanted ahead of a stream; 0: none are.
    window_max: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The block behind what was read.
    next: u64,
    /// Blocks that were read one after the other.
    read: u64,
    readings: u32,
    /// Up to this block it was asked for.
    ahead: u64,
    used: u64,
}

impl Streams {
    pub(super) fn new(window_max: u64) -> Self {
        Self { streams: [Stream::default(); STREAMS], time: 0, window_max }
    }

    /// Notes a reading. Returns what is to be fetched now, for the readings that follow.
    ///
    /// That is twice as much as was read, and at most the window. It is asked for when less than
    /// half of this is ahead.
    pub(super) fn read(&mut self, span: Span) -> Option<Span> {
        if self.window_max == 0 {
            return None;
        }
        self.time += 1;
        let goes_on = |stream: &&mut Stream| {
            stream.used > 0 && stream.next.abs_diff(span.start) <= SLACK_BLOCKS
        };
        let Some(stream) = self.streams.iter_mut().find(goes_on) else {
            let oldest = self.streams.iter_mut().min_by_key(|stream| stream.used)?;
            let (next, read) = (span.end(), span.blocks);
            *oldest = Stream { next, read, readings: 1, ahead: next, used: self.time };
            return None;
        };
        stream.used = self.time;
        stream.readings = stream.readings.saturating_add(1);
        stream.read += span.end().saturating_sub(stream.next);
        stream.next = stream.next.max(span.end());
        stream.ahead = stream.ahead.max(stream.next);
        let window = (2 * stream.read).min(self.window_max);
        let is_due = stream.ahead < stream.next + window.div_ceil(2);
        if stream.readings < READINGS_MIN || !is_due {
            return None;
        }
        let start = stream.ahead;
        stream.ahead = stream.next + window;
        Some(Span { start, blocks: stream.ahead - start })
    }

    /// What was returned for a stream is in so many pieces that fetching it costs more than it
    /// brings: it is no stream until it has been read for some time.
    pub(super) fn is_scattered(&mut self, span: Span) {
        let of = |stream: &&mut Stream| stream.ahead == span.end();
        if let Some(stream) = self.streams.iter_mut().find(of) {
            (stream.read, stream.readings) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, blocks: u64) -> Span {
        Span { start, blocks }
    }

    #[test]
    fn the_window_grows_with_what_was_read() {
        let mut streams = Streams::new(1024);
        let mut asked = Vec::new();
        for at in (0..4096).step_by(16) {
            asked.extend(streams.read(span(at, 16)));
        }
        assert_eq!(asked[0], span(64, 128));
        // One goes on where the one before ends, and none is longer than the window.
        assert!(asked.windows(2).all(|pair| pair[0].end() == pair[1].start));
        assert!(asked.iter().all(|asked| asked.blocks <= 1024));
        let ahead = asked.last().unwrap().end() - 4096;
        assert!((512..=1024).contains(&ahead), "{ahead}");
    }

    #[test]
    fn readings_in_another_order_are_a_stream_and_others_are_none() {
        let mut streams = Streams::new(1024);
        let mut asked = 0;
        for at in (0..1024).step_by(32) {
            for at in [at + 16, at] {
                asked += usize::from(streams.read(span(at, 16)).is_some());
            }
        }
        assert!(asked > 1);
        let mut random = 1_u64;
        for _ in 0..10_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            assert_eq!(streams.read(span(1_000_000 + (random >> 33) % 1_000_000, 1)), None);
        }
        assert_eq!(Streams::new(0).read(span(0, 1)), None);
    }

    #[test]
    fn two_streams_at_a_time_are_both_found() {
        let mut streams = Streams::new(1024);
        let (mut one, mut other) = (0, 0);
        for at in (0..1024).step_by(16) {
            one += usize::from(streams.read(span(at, 16)).is_some());
            other += usize::from(streams.read(span(1_000_000 + at, 16)).is_some());
        }
        assert!(one > 1 && one == other);
    }
}
