//! Makes, describes and deletes volumes.
