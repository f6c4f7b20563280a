//! Runs of blocks in the order of their addresses, packed.

use crate::extents::Span;
use crate::format::Run;

/// Bytes that a run takes in memory in [`Extents`](crate::extents::Extents), about.
pub(super) const EXTENT_BYTES: usize = 72;

#[derive(Clone, Debug, Default)]
pub(super) struct Layer {
    runs: Vec<Run>,
}

impl Layer {
    /// Of runs that are in order.
    pub(super) fn new(runs: Vec<Run>) -> Self {
        Self { runs }
    }

    pub(super) fn into_runs(self) -> Vec<Run> {
        self.runs
    }

    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.runs.capacity() * size_of::<Run>()
    }

    /// The runs that have blocks of `span`, cut to it.
    pub(super) fn within(&self, span: Span) -> impl Iterator<Item = Run> {
        let first = self.runs.partition_point(|run| run.span.end() <= span.start);
        let cut = move |run: &Run| {
            let common = run.span.common(span);
            let place = || run.place.advance(common.start - run.span.start);
            (!common.is_empty()).then(|| Run { span: common, place: place() })
        };
        self.runs[first..].iter().map_while(cut)
    }
}
