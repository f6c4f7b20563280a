//! Allocations that may fail.
//!
//! An ordinary allocation that gets no memory ends the process, and with it every other client's
//! disk. So whatever a peer decides the size or number of is allocated through [`attempt`], which
//! fails with [`ErrorKind::NoMemory`]. What is small and of bounded number stays ordinary. For
//! those, 4 MiB are set aside and given up as soon as an attempt fails; until they could be set
//! aside again, all attempts fail.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::{Error, ErrorKind, Result};

/// Memory for ordinary allocations after an attempt has failed, in bytes.
const RESERVE_LEN: usize = 4 << 20;
/// Bytes of its pieces. An allocator gives long ones back to the kernel, and so to all threads;
/// short ones can be had where free memory is scattered.
const PIECE_LENS: [usize; 2] = [256 << 10, 64 << 10];
/// A table that is no longer may grow into the reserve, in bytes: a client that asks for little is
/// not to pay for one that asks for much.
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
/// short reply: what is set aside is there for it, too.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when `allocate` fails all the same.
#[inline]
pub fn insist<T, E>(mut allocate: impl FnMut() -> Result<T, E>) -> Result<T> {
    allocate().or_else(|_| {
        let error = give_up();
        allocate().map_err(|_| error)
    })
}

/// Whether this many bytes can be had in one piece now: asked before a table grows that cannot fail
/// to. [`attempt`] is better where it can.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when they cannot.
pub fn check_room(bytes: usize) -> Result<()> {
    attempt(|| Vec::<u8>::new().try_reserve_exact(bytes))
}

/// Whether a table with `len` entries of a type and room for `capacity` takes one more. Asked of a
/// table that has no `try_reserve` and doubles when it is full.
///
/// # Errors
/// [`ErrorKind::NoMemory`] when it would have to grow and cannot.
#[inline]
pub fn check_growth<T>(len: usize, capacity: usize) -> Result<()> {
    if len < capacity {
        return Ok(());
    }
    // An entry is longer than what is in it by a tag.
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
