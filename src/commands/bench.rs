//! `sheave bench`: measuring.

pub(crate) use sheave_bench::{Args, run};
