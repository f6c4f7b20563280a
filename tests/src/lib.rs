//! What the end-to-end tests share: a running `sheave serve`, bounded commands, hostile peers.
//!
//! The binary under test is `$SHEAVE_BIN`, else the one that cargo built beside the tests.
//! Everything here panics on failure: it runs only inside tests.
#![forbid(unsafe_code)]

mod bucket;
mod bystander;
mod calls;
mod certs;
pub mod co;
mod command;
mod daemon;
mod docker;
mod docker_engine;
mod docker_site;
mod fake_kernel;
mod files;
mod flexvolume;
mod foreign;
mod go;
mod hanging;
mod loops;
mod namespace;
mod node;
mod plugin;
mod pool_node;
pub mod requests;
mod runtime;
mod s3_server;
mod server;
mod site;
mod skip;
mod strace;
mod targets;
mod wait;
mod wire;

pub use bucket::Bucket;
pub use bystander::Bystander;
pub use calls::Calls;
pub use certs::Certificates;
pub use command::{Output, Run, have, python, sheave};
pub use daemon::Daemon;
pub use docker::DockerPlugin;
pub use docker_engine::{DockerEngine, on_docker};
pub use docker_site::DockerSite;
pub use fake_kernel::{Call, FakeKernel, Moment};
pub use files::{Scratch, append_line, compare, pattern};
pub use flexvolume::{FlexSite, FlexSpec, FlexVolume};
pub use foreign::Foreign;
pub use go::{go_module, go_tool};
pub use hanging::{Hang, HangingDisk};
pub use loops::{LoopVolumes, Strike};
pub use namespace::{Mounts, child, in_namespace, on_devices, parents_dir, part, unmount_below};
pub use node::{Load, Node, check_failed};
pub use plugin::Plugin;
pub use pool_node::PoolNode;
pub use runtime::start_runtime;
pub use s3_server::S3Server;
pub use server::{Serve, Server};
pub use site::{Site, fs_types, has_fs, may_grow, refused, system_path};
pub(crate) use skip::note;
pub use skip::{skip, uring_or_skip};
pub use strace::Trace;
pub use targets::{Verdict, judge};
pub use wait::{PATIENCE, eventually};
pub use wire::{
    Chunk, GoReply, Wire, cmd, errno, flag, go_data, magic, opt, option_header, reply,
    request_header,
};

/// Runs a test with each engine: `both_engines! { fn name(engine) { … } }` makes the tests
/// `name::uring` and `name::threads`.
#[macro_export]
macro_rules! both_engines {
    ($(fn $name:ident($engine:ident) $body:block)*) => {$(
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            fn run($engine: &str) $body

            #[test]
            fn uring() {
                if $crate::uring_or_skip(concat!(stringify!($name), "::uring")) {
                    run("uring");
                }
            }

            #[test]
            fn threads() {
                run("threads");
            }
        }
    )*};
}
