//! Copies between ordinary bytes and shared buffers, as fast as the kernel makes them.
//!
//! Safe code copies to and from shared buffers word by word, since they are atomics. Where a
//! payload arrives through a receive buffer that copy is the largest cost of a small write, so it
//! is made by one machine instruction here, which the compiler knows as little about as about a
//! `recv` by the kernel.

use sheave_core::{Buf, Payload, Segment};

/// Stores `bytes` into the payload at `at`.
///
/// # Panics
/// When they do not fit or would land in a zero segment: a bug of the caller.
pub fn copy_in(payload: &Payload, at: usize, bytes: &[u8]) {
    let (mut at, mut from) = (at, bytes);
    for segment in payload.segments() {
        let skip = at.min(segment.len());
        let (now, later) = from.split_at(from.len().min(segment.len() - skip));
        at -= skip;
        from = later;
        match segment {
            Segment::Data(buf) => store(buf, skip, now),
            Segment::Zero(_) => assert!(now.is_empty(), "no store into a zero segment"),
        }
        if from.is_empty() {
            return;
        }
    }
    assert!(from.is_empty(), "copy_in inside the payload");
}

#[cfg(target_arch = "x86_64")]
fn store(buf: &Buf, skip: usize, bytes: &[u8]) {
    assert!(skip <= buf.len() && bytes.len() <= buf.len() - skip, "store inside the buffer");
    let to = crate::iovec::address(buf).wrapping_add(skip);
    // SAFETY: `to` begins `skip` bytes into the buffer, whose memory the borrow keeps alive and
    // which has room for all bytes, as just asserted; the pages are atomics, so they may change
    // while shared. `bytes` is readable and cannot overlap exclusive-or-frozen memory of others.
    // `rep movsb` counts upwards, the direction flag is clear by the ABI.
    // JUSTIFICATION: twice as fast on cold memory as the loop of atomic stores in safe code.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") bytes.len() => _,
            inout("rsi") bytes.as_ptr() => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn store(buf: &Buf, skip: usize, bytes: &[u8]) {
    buf.copy_in(skip, bytes);
}

/// Loads all of `buf` into `out`, which is as long.
pub(crate) fn load(buf: &Buf, out: &mut [u8]) {
    assert_eq!(buf.len(), out.len(), "a load of the whole buffer");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the source is `buf.len()` bytes that the borrow keeps alive, the target as many
    // exclusive bytes; see `store` for the rest.
    // JUSTIFICATION: as for `store`.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") out.len() => _,
            inout("rsi") crate::iovec::address(buf) => _,
            inout("rdi") out.as_mut_ptr() => _,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    buf.copy_out(0, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_safe_copy() {
        let model: Vec<u8> = (0..9000_u32).map(|i| (i * 31 / 7) as u8).collect();
        for (at, len) in [(0, 9000), (1, 4096), (4095, 2), (8999, 1), (3, 0)] {
            let mut payload = Payload::from(Buf::zeroed(5000));
            payload.push(Segment::Data(Buf::zeroed(4100).slice(100, 4000)));
            copy_in(&payload, at, &model[..len]);
            let mut want = vec![0; 9000];
            want[at..at + len].copy_from_slice(&model[..len]);
            assert_eq!(payload.to_vec(), want, "at {at} len {len}");
        }
        let buf = Buf::from_bytes(&model).slice(5, 8000);
        let mut out = vec![0; 8000];
        load(&buf, &mut out);
        assert_eq!(out, &model[5..8005]);
    }
}
