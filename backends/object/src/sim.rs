//! Simulations of the protocol.
