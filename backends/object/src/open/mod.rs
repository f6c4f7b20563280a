//! Opens a volume.
