//! Errors as the control API answers them.

use sheave_core::{Error, ErrorKind};
use tonic::{Code, Status};

/// Bytes of a message. The transport takes 16 KiB, with three bytes for one that is not plain.
const MESSAGE_LEN_MAX: usize = 2048;

/// The answer for an error.
pub(crate) fn status(error: Error) -> Status {
    Status::new(code(error.kind()), shortened(error.to_string()))
}

/// A message without its middle, if it quotes a name that is very long: the transport ends the
/// connection over one that is, and the caller sees no daemon.
fn shortened(message: String) -> String {
    if message.len() <= MESSAGE_LEN_MAX {
        return message;
    }
    let (mut head, mut tail) = (MESSAGE_LEN_MAX / 2, message.len() - MESSAGE_LEN_MAX / 2);
    while !message.is_char_boundary(head) {
        head -= 1;
    }
    while !message.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{} … {}", &message[..head], &message[tail..])
}

/// The gRPC code of a kind of error: <https://grpc.io/docs/guides/status-codes/>.
fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Busy | ErrorKind::Fenced => Code::FailedPrecondition,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Exists => Code::AlreadyExists,
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Io | ErrorKind::Shutdown => Code::Unavailable,
        ErrorKind::NoMemory | ErrorKind::NoSpace => Code::ResourceExhausted,
        ErrorKind::NotFound => Code::NotFound,
        // CSI uses this code when an operation on the volume is pending.
        ErrorKind::Pending => Code::Aborted,
        ErrorKind::Permission => Code::PermissionDenied,
        ErrorKind::TimedOut => Code::DeadlineExceeded,
        ErrorKind::TooLarge => Code::OutOfRange,
        ErrorKind::Unsupported => Code::Unimplemented,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_code() {
        let codes = ErrorKind::ALL.map(|kind| code(kind) as i32);
        assert_eq!(codes, [9, 15, 6, 9, 3, 14, 8, 8, 5, 10, 7, 14, 4, 11, 12]);
    }

    #[test]
    fn a_message_that_is_too_long_has_its_begin_and_its_end() {
        for part in ["x", "ü"] {
            let message = shortened(format!("begins{}ends", part.repeat(100_000)));
            assert!(message.len() < MESSAGE_LEN_MAX + 8, "{}", message.len());
            assert!(message.starts_with("begins") && message.ends_with("ends"), "{message}");
        }
        assert_eq!(shortened("short".to_owned()), "short");
    }
}
