//! Whether the answer of a call gets to Docker. A container that Docker could not start, since it
//! had given up waiting, is never unmounted by it: a mount without an answer is undone.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes};
use http_body_util::{BodyExt as _, Full};
use tokio::runtime::Handle;

use crate::{Caller, Plugin};

/// A call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) caller: Caller,
    /// Greater than those of all calls before.
    pub(crate) number: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The caller does not wait for the answer any more.
    has_left: bool,
    mounted: Option<Mounted>,
}

/// What a call has mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    pub(crate) name: String,
    /// Of the reference.
    pub(crate) id: String,
    /// The call's number.
    pub(crate) call: u64,
}

impl Call {
    pub(crate) fn new(caller: Caller, number: u64) -> Self {
        Self { caller, number, state: Mutex::default() }
    }

    pub(crate) fn has_left(&self) -> bool {
        self.state().has_left
    }

    /// Notes what is mounted; false if the caller has left, and nothing is noted.
    pub(crate) fn mounted(&self, name: &str, id: &str) -> bool {
        let mut state = self.state();
        if !state.has_left {
            let (name, id) = (name.to_owned(), id.to_owned());
            state.mounted = Some(Mounted { name, id, call: self.number });
        }
        !state.has_left
    }

    /// Ends it, and returns what it has mounted.
    fn end(&self) -> Option<Mounted> {
        let mut state = self.state();
        state.has_left = true;
        state.mounted.take()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is being answered. It is dropped when the answer is with the kernel, or the
/// connection is gone.
pub(crate) struct Answering {
    plugin: Arc<Plugin>,
    pub(crate) call: Arc<Call>,
    runtime: Handle,
    is_delivered: bool,
}

impl Answering {
    pub(crate) fn new(plugin: Arc<Plugin>, caller: Caller) -> Self {
        let call = Arc::new(plugin.begin(caller));
        plugin.calls.fetch_add(1, Ordering::Relaxed);
        Self { plugin, call, runtime: Handle::current(), is_delivered: false }
    }

    /// The body of the answer.
    pub(crate) fn body(self, text: String) -> Body {
        let mut answering = self;
        let body = Full::new(Bytes::from(text)).map_frame(move |frame| {
            answering.note_delivered();
            frame
        });
        Body::new(body)
    }

    /// A method, so that the body's closure owns all of this and not the field alone: it is dropped
    /// with the body, and not before.
    fn note_delivered(&mut self) {
        self.is_delivered = true;
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(mounted) = self.call.end() {
            let (plugin, is_delivered) = (Arc::clone(&self.plugin), self.is_delivered);
            self.runtime.spawn_blocking(move || plugin.answered(&mounted, is_delivered));
        }
        self.plugin.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_whose_caller_has_left_mounts_nothing() {
        let call = Call::new(Caller::default(), 7);
        assert!(call.mounted("db", "c1"));
        let mounted = Mounted { name: "db".to_owned(), id: "c1".to_owned(), call: 7 };
        assert_eq!(call.end(), Some(mounted));
        assert_eq!(call.end(), None);
        assert!(call.has_left() && !call.mounted("db", "c1"));
        assert_eq!(call.end(), None);
    }
}
