//! A list of extents with a bound, and the answer to ops that touch no byte.

use crate::{Error, ErrorKind, Extent, Op, Outcome, Payload, Reply, memory};

/// Extents in order, equal neighbours merged, with a maximum number.
#[derive(Debug)]
pub struct ExtentList {
    extents: Vec<Extent>,
    count_max: usize,
}

impl ExtentList {
    /// An empty list for at most `max` extents, at least one.
    #[must_use]
    pub fn new(count_max: usize) -> Self {
        Self { extents: Vec::new(), count_max: count_max.max(1) }
    }

    /// Appends a run; false when the list is full without it, or cannot grow.
    pub fn push(&mut self, run: Extent) -> bool {
        if run.len == 0 {
            return true;
        }
        if let Some(last) = self.extents.last_mut()
            && last.hole == run.hole
            && last.zero == run.zero
        {
            last.len += run.len;
            return true;
        }
        let has_room = self.extents.len() < self.count_max
            && memory::attempt(|| self.extents.try_reserve(1)).is_ok();
        if has_room {
            self.extents.push(run);
        }
        has_room
    }

    /// The reply to a block status op.
    ///
    /// # Errors
    /// When there was no memory for a single run.
    pub fn into_reply(self) -> Outcome {
        match self.extents.is_empty() {
            true => Err(Error::new(ErrorKind::NoMemory, "block_status", "no memory for extents")),
            false => Ok(Reply::Extents(self.extents)),
        }
    }
}

/// A run that is not allocated and reads as zeroes.
#[must_use]
pub fn hole(len: u64) -> Extent {
    Extent { len, hole: true, zero: true }
}

/// A run that may hold data: always a safe answer.
#[must_use]
pub fn data(len: u64) -> Extent {
    Extent { len, hole: false, zero: false }
}

/// The outcome of an op whose range is empty, which is the same in every backend.
#[must_use]
pub fn empty_range_outcome(op: &Op) -> Option<Outcome> {
    if !op.range()?.is_empty() {
        return None;
    }
    Some(match op {
        Op::Read { .. } => Ok(Reply::Data(Payload::new())),
        Op::BlockStatus { .. } => {
            let why = "an empty range has no extents; ask for at least one byte";
            Err(Error::new(ErrorKind::Invalid, op.kind().name(), why))
        }
        _ => Ok(Reply::Done),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_and_stops_when_full() {
        let mut list = ExtentList::new(2);
        assert!(list.push(hole(3)) && list.push(hole(4)) && list.push(hole(0)));
        assert!(list.push(data(5)) && list.push(data(1)));
        assert!(!list.push(hole(9)));
        let Ok(Reply::Extents(extents)) = list.into_reply() else { panic!("extents") };
        assert_eq!(extents, [hole(7), data(6)]);
    }
}
