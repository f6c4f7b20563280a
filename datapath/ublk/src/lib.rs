//! The kernel's driver for block devices in user space (`ublk_drv.ko`): volumes as `/dev/ublkbN`.
//!
//! [`attach`] makes a device whose requests reach the shards as completions of io_uring commands,
//! one queue per shard. Their data is copied once, between the request and the volume's memory
//! (`UBLK_F_USER_COPY`), or stays where it is, for file volumes (`UBLK_F_AUTO_BUF_REG`).
//! [`recover`] serves a device again whose server has died; no request in flight is lost.
//!
//! Sources: Linux's Documentation/block/ublk.rst, include/uapi/linux/ublk_cmd.h,
//! drivers/block/ublk_drv.c.
#![forbid(unsafe_code)]

mod control;
mod device;
mod queue;
mod uapi;

pub use control::{check, probe};
pub use device::{Device, attach, check_resize, find, recover};
