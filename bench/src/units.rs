//! Sizes as people write and read them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, written as the size of a volume is: `512`, `4k`, `1M`, `2GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ByteSize(pub(crate) u64);

impl FromStr for ByteSize {
    type Err = sheave_core::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        sheave_core::parse_size(text).map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.iter().find(|(_, shift)| self.0 >= 1 << shift) {
            None => write!(f, "{} B", self.0),
            Some((unit, shift)) if self.0.trailing_zeros() >= *shift => {
                write!(f, "{} {unit}", self.0 >> shift)
            }
            Some((unit, shift)) => {
                write!(f, "{:.1} {unit}", self.0 as f64 / (1_u64 << shift) as f64)
            }
        }
    }
}

/// Requests per second.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        0.0..100.0 => format!("{per_second:.1}/s"),
        100.0..10_000.0 => format!("{per_second:.0}/s"),
        _ => format!("{:.0}k/s", per_second / 1e3),
    }
}

/// Bytes per second.
pub(crate) fn throughput(per_second: f64) -> String {
    match per_second {
        0.0..1e9 => format!("{:.0} MB/s", per_second / 1e6),
        _ => format!("{:.2} GB/s", per_second / 1e9),
    }
}

/// A time in microseconds.
pub(crate) fn micros(us: f64) -> String {
    match us {
        0.0..10.0 => format!("{us:.2} µs"),
        10.0..100.0 => format!("{us:.1} µs"),
        100.0..10_000.0 => format!("{us:.0} µs"),
        10_000.0..1e6 => format!("{:.1} ms", us / 1e3),
        _ => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [("512", 512), ("4k", 4096), ("1M", 1 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes));
        }
    }

    #[test]
    fn sizes_are_shown() {
        assert_eq!(ByteSize(4096).to_string(), "4 KiB");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize(17).to_string(), "17 B");
    }

    #[test]
    fn figures_have_two_or_three_digits() {
        assert_eq!(rate(99.4), "99.4/s");
        assert_eq!(rate(123_456.0), "123k/s");
        assert_eq!(throughput(2.345e9), "2.35 GB/s");
        assert_eq!(micros(4.321), "4.32 µs");
        assert_eq!(micros(43_210.0), "43.2 ms");
    }
}
