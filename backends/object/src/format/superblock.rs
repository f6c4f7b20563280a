//! The file that says whose journal a directory has.
