//! Tests that run volumes on an engine.

mod conformance;
