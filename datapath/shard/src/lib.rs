//! Shards: one thread and one ring each, many sessions, one backend a volume.
//!
//! A [`Session`] is the protocol state of one connection; it moves no bytes itself. The engine
//! that owns it, a ring shard or a plain thread, receives, sends and runs the backend.
#![forbid(unsafe_code)]

mod assignment;
mod blocking;
mod clock;
mod connections;
mod core;
mod device_queue;
mod doorbell;
mod ending;
mod engine;
mod failures;
mod inbox;
mod inline;
mod io;
mod opened;
mod poll;
mod pool;
mod queues;
mod session;
mod shard;
mod start;
mod tags;
mod threads;
mod volumes;
mod waiting;
mod waker;
mod writer;

pub use assignment::{Assignment, QueueAssignment, Quiesced, Served};
pub use blocking::Blocking;
pub use clock::Clock;
pub use device_queue::{DeviceQueue, QueueCx};
pub use ending::{Ending, STOP_GRACE};
pub use engine::{Engine, EngineChoice, EngineConfig};
pub use opened::Opened;
pub use pool::Buffers;
pub use session::{Cx, NextRead, Phase, Session};
pub use waiting::IN_FLIGHT_MAX;
