//! Names of objects, relative to the volume.

use crate::ids::{Epoch, Seq, VolumeId};

/// The prefix of all roots.
pub const ROOTS: &str = "root/";
/// The prefix of all log objects.
pub const LOGS: &str = "log/";
/// The prefix of all pins.
pub const PINS: &str = "pin/";
/// The prefix of objects that exist only while a store is probed.
pub const PROBES: &str = "probe/";

/// The key of a root. Its number is inverted, so that the newest root is the first of a listing.
#[must_use]
pub fn root(number: u64) -> String {
    format!("{ROOTS}{:016x}", !number)
}

/// The number of a root, from its key.
#[must_use]
pub fn root_number(key: &str) -> Option<u64> {
    hex(key.strip_prefix(ROOTS)?).map(|inverted| !inverted)
}

/// The prefix of the log objects of an epoch.
#[must_use]
pub fn epoch(epoch: Epoch) -> String {
    format!("{LOGS}{:016x}/", epoch.0)
}

/// The key of a log object.
#[must_use]
pub fn log(epoch: Epoch, seq: Seq) -> String {
    format!("{LOGS}{:016x}/{:016x}", epoch.0, seq.0)
}

/// The epoch and the number of a log object, from its key.
#[must_use]
pub fn log_place(key: &str) -> Option<(Epoch, Seq)> {
    let (epoch, seq) = key.strip_prefix(LOGS)?.split_once('/')?;
    Some((Epoch(hex(epoch)?), Seq(hex(seq)?)))
}

/// The prefix of the pins of a snapshot.
#[must_use]
pub fn pins(snapshot: u64) -> String {
    format!("{PINS}{snapshot:016x}/")
}

/// The key of the pin by which a snapshot stays for a clone.
#[must_use]
pub fn pin(snapshot: u64, clone: VolumeId) -> String {
    format!("{PINS}{snapshot:016x}/{:032x}", u128::from_be_bytes(clone.0))
}

/// 16 digits, as they are written above.
fn hex(text: &str) -> Option<u64> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f');
    (text.len() == 16 && text.bytes().all(is_digit))
        .then(|| u64::from_str_radix(text, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_newest_root_first_and_logs_in_order() {
        assert!(root(0) > root(1) && root(1) > root(u64::MAX));
        assert_eq!(root(0), "root/ffffffffffffffff");
        assert!(log(Epoch(1), Seq(255)) < log(Epoch(1), Seq(256)));
        assert!(log(Epoch(9), Seq(256)) < log(Epoch(10), Seq(1)));
    }

    #[test]
    fn keys_are_read_back_and_other_names_are_not() {
        for number in [0, 1, 77, u64::MAX] {
            assert_eq!(root_number(&root(number)), Some(number));
            let key = log(Epoch(number), Seq(!number));
            assert_eq!(log_place(&key), Some((Epoch(number), Seq(!number))));
            assert!(key.starts_with(&epoch(Epoch(number))));
        }
        for name in ["root/", "root/1", "root/FFFFFFFFFFFFFFFF", "root/+fffffffffffffff", "x"] {
            assert_eq!((root_number(name), log_place(name)), (None, None), "{name}");
        }
    }
}
