//! What the engine needs of the daemon: a volume's device and its record.

use std::path::PathBuf;

use crate::Result;

/// The daemon of this node, and the pools that it knows. Calls block, and have deadlines of their
/// own.
pub trait Volumes: Send + Sync {
    /// Makes a volume a device of this node. One that is there already is returned.
    ///
    /// # Errors
    /// When the volume cannot be had, or a newer publication of it exists.
    fn attach(&self, volume: &str, how: &Attach) -> Result<Device>;

    /// The volume's device, if it has one.
    ///
    /// # Errors
    /// When the daemon does not answer.
    fn device(&self, volume: &str) -> Result<Option<Device>>;

    /// Ends the volume's device. Done if it has none.
    ///
    /// # Errors
    /// When the device is in use, or the daemon does not answer.
    fn detach(&self, volume: &str) -> Result<()>;

    /// Ends the volume's device although it is in use: its I/O fails, and what was not flushed may
    /// be lost. Does not wait for the storage. Done if it has none.
    ///
    /// # Errors
    /// When the daemon does not answer.
    fn detach_by_force(&self, volume: &str) -> Result<()>;

    /// Makes the device as long as the volume is by now.
    ///
    /// # Errors
    /// When it has none, or the daemon does not answer.
    fn grow(&self, volume: &str) -> Result<Device>;

    /// What is recorded of the volume, fresh from its pool.
    ///
    /// # Errors
    /// When there is no such volume, or its pool does not answer.
    fn record(&self, volume: &str) -> Result<Record>;

    /// Records the volume's format, on stable storage when this returns.
    ///
    /// # Errors
    /// When its pool refuses or does not answer.
    fn mark(&self, volume: &str, format: &Format, epoch: Option<u64>) -> Result<()>;
}

/// How a volume is made a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attach {
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Of the publication to this node: older ones are refused.
    pub epoch: Option<u64>,
    /// Which driver makes it.
    pub front: Front,
}

/// The driver of the kernel that makes a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Front {
    /// The better of those that work on the node.
    #[default]
    Auto,
    /// `/dev/ublkbN`.
    Ublk,
    /// `/dev/nbdN`.
    Nbd,
}

impl Front {
    /// How they are written, for messages.
    pub const FORM: &str = "auto, ublk or nbd";
    const ALL: [Self; 3] = [Self::Auto, Self::Ublk, Self::Nbd];

    /// Its name in options and parameters.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
        }
    }

    /// The one of this name; `None` for anything but [`Self::FORM`].
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|front| front.name() == name)
    }
}

/// A device of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Such as `/dev/ublkb0`.
    pub path: PathBuf,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Bytes.
    pub size: u64,
    /// Why its I/O waits, if it does.
    pub waiting: Option<String>,
}

/// What a pool has recorded of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What was put on it.
    pub format: Format,
    /// Its content came from elsewhere (static, cloned, restored), so it is never formatted.
    pub never_format: bool,
}

/// What was put on a volume. It changes only downwards in this list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// Nothing was ever put on it.
    Never,
    /// A filesystem of this type is being made, and was never mounted.
    Begun(String),
    /// A filesystem of this type, or [`RAW`]. From here on it is never formatted.
    Done(String),
}

/// The [`Format`] of a volume that a program had as a raw block device.
pub const RAW: &str = "block";
