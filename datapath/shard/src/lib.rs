//! Shards: one thread and one ring each, many sessions, one backend a volume.
//!
//! A [`Session`] is the protocol state of one connection; it moves no bytes itself. The engine
//! that owns it, a ring shard or a plain thread, receives, sends and runs the backend.
#![forbid(unsafe_code)]

mod blocking;
mod clock;
mod doorbell;
mod ending;
mod engine;
mod failures;
mod io;
mod opened;
mod poll;
mod pool;
mod queue;
mod queues;
mod quick;
mod release;
mod session;
mod shard;
mod start;
mod threads;
mod volumes;
mod waiting;
mod waker;

pub use blocking::Blocking;
pub use clock::Clock;
pub use ending::Ending;
pub use engine::{Assignment, Engine, EngineChoice, EngineConfig, Released, STOP_GRACE};
pub use opened::Opened;
pub use queue::{DeviceQueue, QueueAssignment, QueueCx, Served};
pub use session::{Cx, NextRead, Session};
pub use waiting::IN_FLIGHT_MAX;
