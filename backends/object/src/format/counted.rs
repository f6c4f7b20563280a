//! The objects that a checkpoint counts.

use super::code::{Reader, Wrong, put_number};
use super::object::OBJECT_BYTES_MAX;
use crate::ids::Seq;

/// A log object that is not deleted, as a checkpoint counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Its number.
    pub seq: Seq,
    /// Its length in bytes.
    pub bytes: u32,
    /// Bytes of its frames of blocks that leaves refer to.
    pub by_leaves: u32,
    /// What the first checkpoint has that refers to none of its bytes: all objects up to this one.
    pub death: Option<Seq>,
}

/// An object takes at least so many bytes.
pub(super) const COUNTED_BYTES_MIN: usize = 4;
/// And at most so many, where numbers of objects have 35 bits.
pub(crate) const COUNTED_BYTES_MAX: u64 = 18;

/// Appends the objects of a checkpoint that has all up to one.
pub(super) fn put_counted(out: &mut Vec<u8>, objects: &[Counted], covered: Seq) {
    put_number(out, objects.len() as u64);
    let mut next = 1;
    for Counted { seq, bytes, by_leaves, death } in objects {
        let age = death.map_or(0, |death| (covered.0 + 1).wrapping_sub(death.0));
        for number in [seq.0 - next, u64::from(*bytes), u64::from(*by_leaves), age] {
            put_number(out, number);
        }
        next = seq.0 + 1;
    }
}

/// Takes the objects of a checkpoint that has all up to one.
pub(super) fn take_counted(
    reader: &mut Reader<'_>,
    bytes_max: usize,
    covered: Seq,
) -> Result<Vec<Counted>, Wrong> {
    const OUTSIDE: Wrong = Wrong::Damaged("its objects contradict one another");
    let count = reader.number()? as usize;
    if count > bytes_max / COUNTED_BYTES_MIN {
        return Err(OUTSIDE);
    }
    let mut objects = Vec::with_capacity(count);
    let mut next = 1_u64;
    for _ in 0..count {
        let [gap, bytes] = [reader.number()?, reader.number()?];
        let [by_leaves, age] = [reader.number()?, reader.number()?];
        let seq = next.checked_add(gap).filter(|seq| *seq <= covered.0).ok_or(OUTSIDE)?;
        let death = match age {
            0 => None,
            _ => Some(Seq((covered.0 + 1).checked_sub(age).ok_or(OUTSIDE)?)),
        };
        let is_dead = death.is_some_and(|death| by_leaves == 0 && death.0 >= seq);
        let by_leaves = u32::try_from(by_leaves).map_err(|_| OUTSIDE)?;
        if bytes > OBJECT_BYTES_MAX || death.is_some() != is_dead {
            return Err(OUTSIDE);
        }
        let bytes = bytes as u32;
        objects.push(Counted { seq: Seq(seq), bytes, by_leaves, death });
        next = seq + 1;
    }
    Ok(objects)
}
