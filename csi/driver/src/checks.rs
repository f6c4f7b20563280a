//! What every request is checked for, before it has an effect.

use std::collections::HashMap;

use tonic::Status;

/// The specification, "Size Limits": bytes of a string, of a map, of a node's id.
const TEXT_LEN_MAX: usize = 128;
const MAP_LEN_MAX: usize = 4 << 10;
const NODE_ID_LEN_MAX: usize = 256;
/// Bytes of an error's message, which ends up in events of claims and pods (1 KiB there).
const MESSAGE_LEN_MAX: usize = 1024;

/// Why a capability with a group is refused. It is announced by drivers of filesystems whose files
/// have no owners of their own; here the orchestrator sets the group (`fsGroupPolicy: File`).
pub const NO_MOUNT_GROUP: &str =
    "has a volume_mount_group; the group of files is set by the orchestrator (fsGroup)";

/// A text that must be there and short.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn text<'a>(what: &str, text: &'a str) -> Result<&'a str, Status> {
    bounded(what, text, TEXT_LEN_MAX)
}

/// A node's id.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn node_id(id: &str) -> Result<&str, Status> {
    bounded("node_id", id, NODE_ID_LEN_MAX)
}

fn bounded<'a>(what: &str, text: &'a str, most: usize) -> Result<&'a str, Status> {
    match text.len() {
        0 => Err(Status::invalid_argument(format!("{what} is missing"))),
        len if len > most => {
            let why = format!("{what} has {len} bytes; the most is {most}");
            Err(Status::invalid_argument(why))
        }
        _ => Ok(text),
    }
}

/// The part of a message that an error may have.
#[must_use]
pub fn message(text: &str) -> String {
    let mut end = text.len().min(MESSAGE_LEN_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// A map that must not be too long. Its values may be secret, so none is shown.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn map(what: &str, map: &HashMap<String, String>) -> Result<(), Status> {
    let len: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if len > MAP_LEN_MAX {
        let why = format!("{what} has {len} bytes; the most is {MAP_LEN_MAX}");
        return Err(Status::invalid_argument(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_15_limits_are_those_of_the_specification() {
        assert!(text("name", &"n".repeat(128)).is_ok());
        assert!(text("name", &"n".repeat(129)).is_err());
        assert!(text("name", "").is_err());
        assert!(node_id(&"n".repeat(256)).is_ok());
        assert!(node_id(&"n".repeat(257)).is_err());
        assert_eq!(message(&"ü".repeat(1000)).len(), 1024);
        assert_eq!(message(&format!("a{}", "ü".repeat(1000))).len(), 1023);
        let full = HashMap::from([("k".to_owned(), "v".repeat(4095))]);
        assert!(map("parameters", &full).is_ok());
        let over = HashMap::from([("k".to_owned(), "v".repeat(4096))]);
        let why = map("secrets", &over).unwrap_err();
        assert!(!why.message().contains("vv"), "{why}");
    }
}
