//! An open volume.
