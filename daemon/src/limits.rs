//! Limits of a device that change while it is in use.

use sheave_core::{Error, ErrorKind, Result};
use sheave_layers::RateLimits;

use crate::Devices;
use crate::slot::{Attached, Entry};

/// A change of a device's limits; `None` leaves a limit as it is, and 0 removes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewLimits {
    /// Bytes read and written per second.
    pub bytes_per_second: Option<u64>,
    /// Ops of any kind per second.
    pub ops_per_second: Option<u64>,
}

impl NewLimits {
    fn of(self, limits: RateLimits) -> RateLimits {
        RateLimits {
            bytes_per_second: self.bytes_per_second.unwrap_or(limits.bytes_per_second),
            ops_per_second: self.ops_per_second.unwrap_or(limits.ops_per_second),
        }
    }
}

impl Devices {
    /// Changes the limits of the device at this path or of this volume. They hold beside those of
    /// the volume's own text, until the device is detached, whichever daemon serves it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such device, and errors of writing its record.
    pub fn set_limits(&self, target: &str, new: NewLimits) -> Result<Attached> {
        let (name, slot) = self.find("set limits", target)?;
        let mut entry = slot.hold_or_busy("set limits", &name)?;
        let gone = || Error::new(ErrorKind::NotFound, "set limits", format!("{name} is ended"));
        let limited = {
            let record = entry.record().ok_or_else(gone)?;
            record.limited(new.of(record.limits()))
        };
        self.records.save(&limited)?;
        match &mut *entry {
            Entry::Attached(live) => {
                live.limits.set(limited.limits());
                live.record = limited;
            }
            // They hold as soon as its volume can be opened.
            Entry::Waiting { record, .. } => *record = limited,
            Entry::Free => {}
        }
        entry.attached().ok_or_else(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_not_named_stays() {
        let had = RateLimits { bytes_per_second: 1 << 20, ops_per_second: 100 };
        assert_eq!(NewLimits::default().of(had), had);
        let new = NewLimits { ops_per_second: Some(7), ..NewLimits::default() };
        assert_eq!(new.of(had), RateLimits { ops_per_second: 7, ..had });
        let lift = NewLimits { bytes_per_second: Some(0), ..NewLimits::default() };
        assert_eq!(lift.of(had), RateLimits { bytes_per_second: 0, ..had });
    }
}
