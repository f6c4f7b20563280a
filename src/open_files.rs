//! The limit of open files of this process (getrlimit(2)).

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one. The soft one is low for programs that use
/// select(2), which neither this one nor its children do.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if raised == limit {
        return;
    }
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => {}
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
}
