//! Publishes the statistics of a process that serves volumes, and reads those of others.

mod exports;
mod listener;
mod metrics;
mod objects;
mod rates;
mod runtime_dir;
mod servers;
mod socket;

pub(crate) use exports::{ClientEntry, ExportEntry};
pub(crate) use metrics::MetricsServer;
pub(crate) use objects::line as object_line;
pub(crate) use rates::{COLUMNS, Row, op_rows, stage_rows};
pub(crate) use runtime_dir::{RuntimeDir, listen_alone, listen_at};
pub(crate) use servers::{ServerSnapshot, Servers};
pub(crate) use socket::StatsSocket;
