//! One call at a time for each volume.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::Status;

/// Volumes, by id or name, that a call is about.
#[derive(Clone, Default)]
pub(crate) struct Pending {
    keys: Arc<Mutex<HashSet<String>>>,
}

/// A call that is under way. The next one may come when it is dropped.
pub(crate) struct Guard {
    pending: Pending,
    key: String,
}

impl Pending {
    /// Begins a call about this volume.
    ///
    /// # Errors
    /// ABORTED, at once, while another one is under way (the specification, "Concurrency").
    pub(crate) fn begin(&self, key: &str) -> Result<Guard, Status> {
        if !self.lock().insert(key.to_owned()) {
            let why =
                format!("{key}: another call about this volume is under way; try again later");
            return Err(Status::aborted(why));
        }
        Ok(Guard { pending: self.clone(), key: key.to_owned() })
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pending.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_11_a_second_call_is_aborted_until_the_first_has_ended() {
        let pending = Pending::default();
        let first = pending.begin("fast/a").unwrap();
        assert_eq!(pending.begin("fast/a").err().unwrap().code(), tonic::Code::Aborted);
        pending.begin("fast/b").unwrap();
        drop(first);
        pending.begin("fast/a").unwrap();
    }
}
