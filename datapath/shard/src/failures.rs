//! Counts failed requests, and logs those that the storage failed.

use std::time::SystemTime;

use sheave_core::{Error, ErrorKind, Nanos, OpKind};
use sheave_telemetry::{Notice, Recorder};

/// Counts a failed request. The first storage error of an op and kind is logged at WARN, and then
/// their number once a minute while they go on.
#[cold]
pub(crate) fn report(recorder: &Recorder, op: OpKind, error: &Error, now: Nanos) {
    recorder.add_error(op);
    let op_name = op.name();
    if !is_of_storage(error) {
        // The name takes a lock, so it is fetched only if the line is logged.
        return tracing::debug!(
            volume = &*recorder.volume(),
            op = op_name,
            %error,
            "request failed"
        );
    }
    let volume = &*recorder.volume();
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let unix_s = since_1970.map_or(0, |since| since.as_secs());
    match recorder.note_failure(op, error, now, unix_s) {
        Notice::First => tracing::warn!(volume, op = op_name, %error, "storage error"),
        Notice::Again(count) => {
            tracing::warn!(volume, op = op_name, count, %error, "storage errors go on");
        }
        Notice::Quiet => tracing::debug!(volume, op = op_name, %error, "storage error"),
    }
}

/// Whether the storage is at fault, rather than a request that is invalid or not allowed.
fn is_of_storage(error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Busy
        | ErrorKind::Corrupt
        | ErrorKind::Fenced
        | ErrorKind::Io
        | ErrorKind::NoMemory
        | ErrorKind::NoSpace
        | ErrorKind::NotFound
        | ErrorKind::TimedOut => true,
        // Such as EROFS and EINVAL of the kernel.
        ErrorKind::Exists
        | ErrorKind::Invalid
        | ErrorKind::Pending
        | ErrorKind::Permission
        | ErrorKind::TooLarge => error.has_cause(),
        ErrorKind::Shutdown | ErrorKind::Unsupported => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_client_that_asks_for_nonsense_is_no_storage_error() {
        for kind in [ErrorKind::Invalid, ErrorKind::Permission, ErrorKind::Unsupported] {
            assert!(!is_of_storage(&Error::new(kind, "write", "the request is wrong")), "{kind:?}");
        }
        for errno in [5, 22, 28, 30] {
            let error = Error::from_io("write", "a.img", io::Error::from_raw_os_error(errno));
            assert!(is_of_storage(&error), "{error}");
        }
    }
}
