//! Which journal belongs to a volume.
