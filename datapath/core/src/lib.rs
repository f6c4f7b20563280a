//! The contract between fronts (NBD, ublk) and backends (memory, file, …).
//!
//! A front parses a request into an [`Op`] and hands it to a [`Backend`]; the backend answers with
//! a [`Completion`]. Nothing here does I/O: a backend asks its engine for it through [`Io`].
#![forbid(unsafe_code)]

mod backend;
mod buf;
mod error;
pub mod extents;
mod io;
mod legs;
mod link;
pub mod memory;
mod op;
mod payload;
mod percent;
mod printable;
mod range;
mod stalled;
mod text;

pub use backend::{Backend, BlockSizes, Capabilities, Layer, Submitted, Volume, VolumeInfo};
pub use buf::{Buf, PAGE_SIZE, Page};
pub use error::{Error, ErrorKind, NbdErrno, Result};
pub use io::{Allocate, Destination, Io, IoDone, IoRequest, IoStage, IoToken, Nanos};
pub use legs::{Issuer, Legs, OWN_BITS};
pub use link::{Link, LinkGauges, LinkState};
pub use op::{Completion, Extent, Op, OpKind, Outcome, Reply, Tag};
pub use payload::{Payload, Segment};
pub use percent::{percent_decode, percent_encode};
pub use printable::{Printable, is_plain, printable};
pub use range::{ByteRange, RangeError};
pub use stalled::Stalled;
pub use text::{parse_count, parse_digits, parse_duration_ns, parse_size};
