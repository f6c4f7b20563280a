//! Records of the journal.
