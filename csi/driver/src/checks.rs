//! What every request is checked for, before it has an effect.

use std::collections::HashMap;

use tonic::Status;

/// The specification, "Size Limits": bytes of a string, of a map, of a node's id.
const TEXT_LEN_MAX: usize = 128;
const MAP_LEN_MAX: usize = 4 << 10;
const NODE_ID_LEN_MAX: usize = 256;
/// Bytes of a message, which ends up in events of claims and pods (1 KiB there).
const MESSAGE_LEN_MAX: usize = 1024;

/// A text that must be there and short.
///
/// # Errors
/// INVALID_ARGUMENT.
pub(crate) fn text<'a>(what: &str, text: &'a str) -> Result<&'a str, Status> {
    bounded(what, text, TEXT_LEN_MAX)
}

/// A node's id.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn check_node_id(id: &str) -> Result<&str, Status> {
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

/// A message, cut to the bytes that an event has room for.
pub(crate) fn message(text: &str) -> String {
    if text.len() <= MESSAGE_LEN_MAX {
        return text.to_owned();
    }
    let ellipsis = "…";
    let end = text.floor_char_boundary(MESSAGE_LEN_MAX - ellipsis.len());
    format!("{}{ellipsis}", &text[..end])
}

/// A map that must not be too long. Its values may be secret, so none is shown.
///
/// # Errors
/// INVALID_ARGUMENT.
pub(crate) fn map(what: &str, map: &HashMap<String, String>) -> Result<(), Status> {
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
        assert!(check_node_id(&"n".repeat(256)).is_ok());
        assert!(check_node_id(&"n".repeat(257)).is_err());
        assert_eq!(message(&"ü".repeat(512)), "ü".repeat(512));
        assert_eq!(message(&"ü".repeat(513)), format!("{}…", "ü".repeat(510)));
        assert_eq!(message(&format!("a{}", "ü".repeat(512))).len(), 1024);
        let full = HashMap::from([("k".to_owned(), "v".repeat(4095))]);
        assert!(map("parameters", &full).is_ok());
        let over = HashMap::from([("k".to_owned(), "v".repeat(4096))]);
        let why = map("secrets", &over).unwrap_err();
        assert!(!why.message().contains("vv"), "{why}");
    }
}
