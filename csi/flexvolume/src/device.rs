//! What stands for a device between controller-manager and a node: a publication, as the device
//! itself is not made before the node uses it.

use std::fmt;

/// A publication to a node, written `POOL/UUID:EPOCH:NODE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// Its id.
    pub(crate) volume: String,
    pub(crate) epoch: u64,
    pub(crate) node: String,
}

impl Device {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (volume, rest) = text.split_once(':')?;
        let (epoch, node) = rest.split_once(':')?;
        let epoch = sheave_core::parse_digits(epoch)?;
        let is_whole = volume.contains('/') && !node.is_empty();
        is_whole.then(|| Self { volume: volume.to_owned(), epoch, node: node.to_owned() })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.volume, self.epoch, self.node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_it_was_written() {
        let device = Device { volume: "fast/1".into(), epoch: 7, node: "n1.example".into() };
        assert_eq!(Device::parse(&device.to_string()), Some(device));
        for text in ["", "/dev/sda", "pvc-1", "fast/1", "fast/1:x:n", "fast/1:1:", "fast:1:n"] {
            assert_eq!(Device::parse(text), None, "{text}");
        }
    }
}
