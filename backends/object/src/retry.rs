//! Requests to a store that are tried again until their answer is known.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};

use crate::answers::Answers;
use crate::clock::Clock;
use crate::store::{Created, Listed, Store, StoreError, StoreErrorKind};
use crate::traffic::{Asked, RequestKind, Traffic};

/// The first pause before another try, and the longest.
const PAUSE_MS_MIN: u64 = 20;
const PAUSE_MS_MAX: u64 = 5_000;
/// When the store answers again, so much of a pause is left: not all that waits comes at once.
const HURRY: u64 = 16;
/// How much of an object is compared to tell whether it is one's own. A log object's header, which
/// names its author and has checksums of the rest, is shorter; a root is not longer.
const COMPARED_BYTES_MAX: u64 = 4096;

/// How long a request is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Until the store has answered: what is written waits for it.
    Endless,
    /// That long, in milliseconds: a caller waits for it. A store that refuses this client is not
    /// asked again.
    Ms(u64),
}

/// The answer to a creation, when it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The object is the one that was to be made.
    Mine,
    /// Another object has the name; its first bytes.
    Theirs(Bytes),
}

/// A store with its clock, for one volume.
#[derive(Clone)]
pub struct Requests {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    /// The volume's name, for messages.
    name: Arc<str>,
    patience: Patience,
    listener: Option<Arc<dyn Listener>>,
    traffic: Arc<Traffic>,
    /// What the store has answered to these requests and their clones.
    answers: Arc<Answers>,
}

/// Hears what the store answers.
pub trait Listener: Send + Sync {
    /// The last word of the store: `None` if it has done what it was asked.
    fn store_says(&self, error: Option<&StoreError>);
}

impl Requests {
    /// Requests of a caller that waits for their answers, for half a minute at most.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, name: &str) -> Self {
        let patience = Patience::Ms(30_000);
        let (traffic, answers) = Default::default();
        Self { store, clock, name: name.into(), patience, listener: None, traffic, answers }
    }

    /// The same for another volume beside this one.
    ///
    /// # Errors
    /// When the store has no other volumes.
    pub(crate) fn beside(&self, name: &str) -> Result<Self> {
        let why = "this store has no other volumes beside it";
        let none = || self.error(ErrorKind::Unsupported, "open", "", why);
        let store = self.store.sibling(name).ok_or_else(none)?;
        let name = format!("{} beside {}", sheave_core::printable(name), self.name).into();
        Ok(Self { store, name, ..self.clone() })
    }

    /// The same with other patience.
    #[must_use]
    pub fn with_patience(&self, patience: Patience) -> Self {
        Self { patience, ..self.clone() }
    }

    /// The same, with something that hears all answers.
    #[must_use]
    pub fn heard_by(&self, listener: Arc<dyn Listener>) -> Self {
        Self { listener: Some(listener), ..self.clone() }
    }

    /// The same, whose answers nothing hears.
    pub(crate) fn unheard(&self) -> Self {
        Self { listener: None, ..self.clone() }
    }

    /// The volume's name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it and its clones have asked of the store.
    pub(crate) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// An error about an object of this volume, or about the volume if there is no key.
    #[must_use]
    pub fn error(&self, kind: ErrorKind, op: &'static str, key: &str, why: &str) -> Error {
        let of = if key.is_empty() { String::new() } else { format!("{key} of ") };
        Error::new(kind, op, format!("{of}{}: {why}", self.name))
    }

    /// Makes an object. It is tried with the same bytes until the answer is known.
    ///
    /// # Errors
    /// When the store cannot, or the patience ends: then it may be made later nevertheless.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<Settled> {
        let compared = COMPARED_BYTES_MAX.min(body.len() as u64);
        let asked = self.ask();
        let mut pauses = Pauses::new(self);
        loop {
            let made = self.store.create(key, body.clone());
            match self.try_once(&asked, RequestKind::Create, made, |_| body.len()).await {
                Ok(Created::Made) => {
                    self.hear(None);
                    return Ok(Settled::Mine);
                }
                // An earlier try may have made it.
                Ok(Created::Exists) => {
                    match self.get_once(&asked, key, 0..COMPARED_BYTES_MAX).await {
                        Ok(found) => {
                            self.hear(None);
                            let is_mine = found.get(..compared as usize)
                                == body.get(..compared as usize)
                                && (compared == COMPARED_BYTES_MAX || found.len() == body.len());
                            return Ok(if is_mine {
                                Settled::Mine
                            } else {
                                Settled::Theirs(found)
                            });
                        }
                        Err(error) => pauses.after(error, "create", key, true).await?,
                    }
                }
                Err(error) => pauses.after(error, "create", key, true).await?,
            }
        }
    }

    /// Asks once for an object to be made.
    ///
    /// # Errors
    /// Those of the store; it may be made nevertheless.
    pub(crate) async fn create_once(&self, key: &str, body: Bytes) -> Result<Created, StoreError> {
        let (asked, bytes) = (self.ask(), body.len());
        let made = self.store.create(key, body);
        self.try_once(&asked, RequestKind::Create, made, |_| bytes).await
    }

    /// The bytes of an object in a range, fewer if it ends before; `None` if there is no object.
    ///
    /// # Errors
    /// When the store cannot, or the patience ends.
    pub async fn get(&self, key: &str, range: Range<u64>) -> Result<Option<Bytes>> {
        let (asked, mut pauses) = (self.ask(), Pauses::new(self));
        loop {
            match self.get_once(&asked, key, range.clone()).await {
                Ok(found) => {
                    self.hear(None);
                    return Ok(Some(found));
                }
                Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(None),
                Err(error) => pauses.after(error, "read", key, false).await?,
            }
        }
    }

    /// See [`Store::list`].
    ///
    /// # Errors
    /// When the store cannot, or the patience ends.
    pub async fn list(&self, prefix: &str, after: &str, max: usize) -> Result<Vec<Listed>> {
        let (asked, mut pauses) = (self.ask(), Pauses::new(self));
        loop {
            let found = self.store.list(prefix, after, max);
            match self.try_once(&asked, RequestKind::List, found, |_| 0).await {
                Ok(found) => {
                    self.hear(None);
                    return Ok(found);
                }
                Err(error) => pauses.after(error, "list", prefix, false).await?,
            }
        }
    }

    /// Deletes an object, if it exists.
    ///
    /// # Errors
    /// When the store cannot, or the patience ends.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let (asked, mut pauses) = (self.ask(), Pauses::new(self));
        loop {
            let gone = self.store.delete(key);
            match self.try_once(&asked, RequestKind::Delete, gone, |()| 0).await {
                Ok(()) => {
                    self.hear(None);
                    return Ok(());
                }
                Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(()),
                Err(error) => pauses.after(error, "delete", key, true).await?,
            }
        }
    }

    fn ask(&self) -> Asked {
        self.traffic.ask(self.clock.now_ms())
    }

    /// Waits for the answer to one try, which is counted.
    async fn try_once<T>(
        &self,
        asked: &Asked,
        kind: RequestKind,
        answer: impl Future<Output = Result<T, StoreError>>,
        bytes_of: impl FnOnce(&T) -> usize,
    ) -> Result<T, StoreError> {
        asked.tried(self.clock.now_ms());
        let answer = answer.await;
        let is_answer = |error: &StoreError| error.kind == StoreErrorKind::NotFound;
        let bytes = match &answer {
            Ok(answer) => Some(bytes_of(answer)),
            Err(error) => is_answer(error).then_some(0),
        };
        asked.answered(kind, bytes);
        if bytes.is_some() {
            self.answers.note();
        }
        answer
    }

    async fn get_once(
        &self,
        asked: &Asked,
        key: &str,
        range: Range<u64>,
    ) -> Result<Bytes, StoreError> {
        self.try_once(asked, RequestKind::Get, self.store.get(key, range), Bytes::len).await
    }

    fn hear(&self, error: Option<&StoreError>) {
        if let Some(listener) = &self.listener {
            listener.store_says(error);
        }
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("store", &self.store).finish_non_exhaustive()
    }
}

/// The pauses between the tries of one request.
struct Pauses<'a> {
    requests: &'a Requests,
    begun_ms: u64,
    tries: u32,
    /// The last pause has ended early.
    was_hurried: bool,
}

impl<'a> Pauses<'a> {
    fn new(requests: &'a Requests) -> Self {
        Self { requests, begun_ms: requests.clock.now_ms(), tries: 0, was_hurried: false }
    }

    /// Waits before another try, or says that there is none. After a change that was answered
    /// nothing, an object that is missing may come: the request is tried again.
    async fn after(
        &mut self,
        error: StoreError,
        op: &'static str,
        key: &str,
        is_change: bool,
    ) -> Result<()> {
        let Requests { clock, patience, .. } = self.requests;
        self.requests.hear(Some(&error));
        let kind = match error.kind {
            StoreErrorKind::Busy => ErrorKind::TimedOut,
            StoreErrorKind::NotFound if is_change => ErrorKind::TimedOut,
            StoreErrorKind::NotFound => ErrorKind::NotFound,
            StoreErrorKind::Denied => ErrorKind::Permission,
            StoreErrorKind::Broken => ErrorKind::Io,
        };
        let waited_ms = clock.now_ms() - self.begun_ms;
        let goes_on = match patience {
            Patience::Endless => kind == ErrorKind::TimedOut || kind == ErrorKind::Permission,
            Patience::Ms(most) => kind == ErrorKind::TimedOut && waited_ms < *most,
        };
        if !goes_on {
            return Err(self.requests.error(kind, op, key, &error.to_string()));
        }
        self.wait(self.pause_ms(key)).await;
        self.tries += 1;
        Ok(())
    }

    /// Waits, but not for all of the pause if the store answers another request meanwhile: then it
    /// is back. If it has refused the next try nevertheless, it has too much to do, and has all of
    /// the next pause.
    async fn wait(&mut self, pause_ms: u64) {
        let Requests { clock, answers, .. } = self.requests;
        let pause = clock.sleep(pause_ms);
        if self.was_hurried {
            self.was_hurried = false;
            return pause.await;
        }
        self.was_hurried = answers.before(pause).await;
        if self.was_hurried {
            clock.sleep(pause_ms / HURRY).await;
        }
    }

    /// Doubles with every try, with a part that differs between objects, so that a store which
    /// comes back is not asked by all at once.
    fn pause_ms(&self, key: &str) -> u64 {
        let pause = (PAUSE_MS_MIN << self.tries.min(16)).min(PAUSE_MS_MAX);
        let mut hasher = crc32fast::Hasher::new_with_initial(self.tries);
        hasher.update(key.as_bytes());
        pause / 2 + u64::from(hasher.finalize()) % (pause / 2)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::store::Answer;
    use crate::threads::block_on;

    /// A store that refuses to make so many objects, and has none.
    #[derive(Debug)]
    struct Refusing(AtomicU32);

    impl Store for Refusing {
        fn create<'a>(&'a self, _: &'a str, _: Bytes) -> Answer<'a, Created> {
            let left = self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
            Box::pin(async move {
                match left {
                    Ok(_) => Err(StoreError::new(StoreErrorKind::Busy, "away")),
                    Err(_) => Ok(Created::Made),
                }
            })
        }

        fn get<'a>(&'a self, key: &'a str, _: Range<u64>) -> Answer<'a, Bytes> {
            Box::pin(async move { Err(StoreError::new(StoreErrorKind::NotFound, key)) })
        }

        fn list<'a>(&'a self, _: &'a str, _: &'a str, _: usize) -> Answer<'a, Vec<Listed>> {
            unreachable!("nothing is listed")
        }

        fn delete<'a>(&'a self, _: &'a str) -> Answer<'a, ()> {
            unreachable!("nothing is deleted")
        }
    }

    /// Pauses do not end by themselves, but what is left of them does.
    struct Still;

    impl Clock for Still {
        fn now_ms(&self) -> u64 {
            0
        }

        fn sleep(&self, ms: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            match ms < PAUSE_MS_MIN / 2 {
                true => Box::pin(async {}),
                false => Box::pin(std::future::pending()),
            }
        }
    }

    #[test]
    fn an_answer_of_the_store_ends_the_pauses_of_other_requests_once() {
        for refusals in [1, 2] {
            let store = Refusing(AtomicU32::new(refusals));
            let requests = Requests::new(Arc::new(store), Arc::new(Still), "v");
            let other = requests.with_patience(Patience::Endless);
            let mut cx = Context::from_waker(Waker::noop());
            let mut made = pin!(requests.create("a", Bytes::from_static(b"a")));
            assert!(made.as_mut().poll(&mut cx).is_pending());
            assert!(made.as_mut().poll(&mut cx).is_pending(), "it waits");
            assert_eq!(block_on(other.get("b", 0..1)).unwrap(), None);
            let polled = made.as_mut().poll(&mut cx);
            assert_eq!(matches!(polled, Poll::Ready(Ok(Settled::Mine))), refusals == 1);
            if polled.is_pending() {
                // What is refused after a pause that has ended early waits for all of the next one.
                assert_eq!(block_on(other.get("b", 0..1)).unwrap(), None);
                assert!(made.as_mut().poll(&mut cx).is_pending(), "the store is overloaded");
            }
        }
    }
}
