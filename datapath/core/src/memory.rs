//! Allocations that may fail.
//!
//! An ordinary allocation that gets no memory ends the process, and with it every other client's
//! disk. So allocations whose size or number a peer decides go through [`attempt`], which fails
//! with [`ErrorKind::NoMemory`]. Small allocations of bounded number stay ordinary. For them, a
//! reserve of 4 MiB is set aside and freed as soon as an attempt fails; until it can be set aside
//! again, all attempts fail.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::{Error, ErrorKind, Result};

/// The reserve for ordinary allocations after an attempt has failed, in bytes.
const RESERVE_LEN: usize = 4 << 20;
/// Sizes of its pieces, in bytes. The allocator returns long pieces to the kernel, and so to all
/// threads; short ones can be allocated where free memory is fragmented.
const PIECE_LENS: [usize; 2] = [256 << 10, 64 << 10];
/// A table of at most this many bytes may grow into the reserve: clients with few requests must not
/// fail because of one with many.
const SMALL_TABLE_LEN: usize = 16 << 10;
const PIECES_MAX: usize = RESERVE_LEN / PIECE_LENS[1];

static RESERVE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
/// Whether [`RESERVE`] is whole.
static IS_WHOLE: AtomicBool = AtomicBool::new(false);

/// Allocates by `allocate`, such as `|| list.try_reserve(1)`.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when `allocate` fails, or has failed lately.
#[inline]
pub fn attempt<T, E>(allocate: impl FnOnce() -> Result<T, E>) -> Result<T> {
    if !IS_WHOLE.load(Relaxed) {
        set_aside()?;
    }
    allocate().map_err(|_| give_up())
}

/// [`attempt`] for at most some tens of KiB without which a connection could not go on, such as a
/// short reply. It may use the reserve.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when `allocate` fails nevertheless.
#[inline]
pub fn insist<T, E>(mut allocate: impl FnMut() -> Result<T, E>) -> Result<T> {
    allocate().or_else(|_| {
        let error = give_up();
        allocate().map_err(|_| error)
    })
}

/// Whether this many bytes can be allocated in one piece now. For tables whose growth cannot fail;
/// use [`attempt`] where it can.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when they cannot.
pub fn check_room(bytes: usize) -> Result<()> {
    attempt(|| Vec::<u8>::new().try_reserve_exact(bytes))
}

/// Whether a table with `len` entries of a type and room for `capacity` can take one more. For
/// tables without `try_reserve` that double when they are full.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when it would have to grow and cannot.
#[inline]
pub fn check_growth<T>(len: usize, capacity: usize) -> Result<()> {
    if len < capacity {
        return Ok(());
    }
    // An entry also has a tag.
    let bytes = (capacity * 2).max(4) * (size_of::<T>() + size_of::<usize>());
    if bytes <= SMALL_TABLE_LEN {
        return insist(|| Vec::<u8>::new().try_reserve_exact(bytes));
    }
    check_room(bytes)
}

/// Makes the reserve whole.
#[cold]
fn set_aside() -> Result<()> {
    // The list is whole after each push.
    let mut reserve = RESERVE.lock().unwrap_or_else(PoisonError::into_inner);
    reserve.try_reserve(PIECES_MAX).map_err(|_| no_memory())?;
    let set_aside: usize = reserve.iter().map(Vec::capacity).sum();
    let mut missing = RESERVE_LEN.saturating_sub(set_aside);
    while missing > 0 {
        let Some(piece) = PIECE_LENS.into_iter().find_map(new_piece) else {
            reserve.clear();
            return Err(no_memory());
        };
        missing = missing.saturating_sub(piece.capacity());
        reserve.push(piece);
    }
    IS_WHOLE.store(true, Relaxed);
    Ok(())
}

fn new_piece(len: usize) -> Option<Vec<u8>> {
    let mut piece = Vec::new();
    piece.try_reserve_exact(len).ok()?;
    Some(piece)
}

#[cold]
fn give_up() -> Error {
    IS_WHOLE.store(false, Relaxed);
    RESERVE.lock().unwrap_or_else(PoisonError::into_inner).clear();
    no_memory()
}

fn no_memory() -> Error {
    let why = "no memory is left; free some or raise the limit of this process";
    Error::new(ErrorKind::NoMemory, "allocate", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_that_fails_is_an_error_and_the_next_is_made_again() {
        for _ in 0..2 {
            for bytes in [usize::MAX, usize::MAX / 2, 1 << 62] {
                assert_eq!(check_room(bytes).unwrap_err().kind(), ErrorKind::NoMemory);
            }
            check_room(1 << 20).unwrap();
        }
    }

    #[test]
    fn a_table_is_asked_only_when_it_is_full() {
        check_growth::<[u8; 1 << 30]>(usize::MAX / 4 - 1, usize::MAX / 4).unwrap();
        let error = check_growth::<[u8; 1 << 30]>(1 << 20, 1 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMemory);
        check_growth::<u64>(0, 0).unwrap();
    }
}
