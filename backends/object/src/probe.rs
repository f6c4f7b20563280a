//! Finds out whether a store does what a volume needs: of several creations of an object at the
//! same time exactly one succeeds, and a listing has what was made, in order.
//!
//! A volume in a store that does not do so has two writers sooner or later, which destroy each
//! other's data. Many stores that speak S3 ignore the condition of a creation, or check it before
//! they write and not as they write.

use bytes::Bytes;
use sheave_core::{Error, ErrorKind, Result};

use crate::format::keys;
use crate::ids::Incarnation;
use crate::retry::{Requests, Settled};
use crate::store::Created;
use crate::together::{Boxed, all, boxed};

/// Objects that are made by several at once, and by how many.
const ROUNDS: usize = 8;
const RACERS: usize = 32;
/// An object has so many bytes, since stores may treat short ones in another way.
const BODY_BYTES: usize = 4096;

/// Races for objects below `probe/` and a name of random bytes, and deletes them: 264 creations, 24
/// reads, 11 listings and 8 deletions.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the store does not do what a volume needs, and those of the
/// store.
pub(crate) async fn race(requests: &Requests, name: Incarnation) -> Result<()> {
    let prefix = format!("{}{name}/", keys::PROBES);
    let outcome = race_below(requests, &prefix).await;
    let made: Vec<_> = (0..ROUNDS).map(|round| key(&prefix, round)).collect();
    let deletions = made.iter().map(|key| boxed(requests.delete(key))).collect();
    let deleted: Result<Vec<()>> = all(deletions).await.into_iter().collect();
    outcome.and_then(|()| deleted.map(drop))
}

async fn race_below(requests: &Requests, prefix: &str) -> Result<()> {
    for round in 0..ROUNDS {
        let key = &key(prefix, round);
        let winner = one_race(requests, key).await?;
        let is_replaced = async {
            let found = requests.get(key, 0..BODY_BYTES as u64).await?;
            Ok((found != Some(body(winner))).then_some("an object was replaced by another"))
        };
        let is_made_again = async {
            let settled = requests.create(key, body(RACERS)).await?;
            Ok((settled == Settled::Mine).then_some("an object that exists can be made again"))
        };
        let is_hidden = async {
            let listed = requests.list(prefix, "", ROUNDS).await?;
            let is_listed = listed.len() == round + 1 && listed[round].key == *key;
            Ok((!is_listed).then_some("a listing lacks an object that was made before it"))
        };
        // At the same time, since openings wait for this.
        check(requests, vec![boxed(is_replaced), boxed(is_made_again), boxed(is_hidden)]).await?;
    }
    check_order(requests, prefix).await
}

/// Lets racers make one object, each once, and returns the one whose object it is. Stores that
/// bound changes of an object to one per second refuse most of the others, and would for long.
async fn one_race(requests: &Requests, key: &str) -> Result<usize> {
    let racers = (0..RACERS).map(|racer| boxed(requests.create_once(key, body(racer))));
    let answers = all(racers.collect()).await;
    if answers.iter().all(Result::is_err) {
        // It says why, or makes the object.
        requests.create(key, body(0)).await?;
    }
    let has_made = |racer: &usize| answers[*racer] == Ok(Created::Made);
    let made: Vec<_> = (0..RACERS).filter(has_made).collect();
    if made.len() > 1 {
        let many = made.len();
        let why = format!("of {RACERS} creations of one object at a time {many} succeeded");
        return Err(refused(requests, &why));
    }
    let found = requests.get(key, 0..BODY_BYTES as u64).await?;
    let owner = (0..RACERS).find(|racer| found == Some(body(*racer)));
    // One that got no answer may have made it.
    let is_right = |owner: &usize| made.is_empty() && answers[*owner].is_err();
    match owner.filter(|owner| has_made(owner) || is_right(owner)) {
        Some(owner) => Ok(owner),
        None => Err(refused(requests, "an object is not the one that was made")),
    }
}

/// A listing begins with the lowest key, or behind the one that is named, and has no more than are
/// asked for.
async fn check_order(requests: &Requests, prefix: &str) -> Result<()> {
    let middle = ROUNDS / 2;
    let asked = [
        (String::new(), 1, Some(0)),
        (key(prefix, middle), 1, Some(middle + 1)),
        (key(prefix, ROUNDS - 1), ROUNDS, None),
    ];
    let checks = asked.map(|(after, max, want)| {
        boxed(async move {
            let listed = requests.list(prefix, &after, max).await?;
            let keys: Vec<_> = listed.into_iter().map(|listed| listed.key).collect();
            let is_right = keys == Vec::from_iter(want.map(|round| key(prefix, round)));
            Ok((!is_right).then_some("a listing is not in the order of the keys"))
        })
    });
    check(requests, checks.into()).await
}

/// Makes checks at the same time. Each says what is wrong, if anything is.
async fn check(
    requests: &Requests,
    checks: Vec<Boxed<'_, Result<Option<&'static str>>>>,
) -> Result<()> {
    let wrong: Result<Vec<_>> = all(checks).await.into_iter().collect();
    match wrong?.into_iter().flatten().next() {
        None => Ok(()),
        Some(why) => Err(refused(requests, why)),
    }
}

/// The error about a store that does not keep its word.
fn refused(requests: &Requests, why: &str) -> Error {
    let why = format!(
        "the store cannot keep a second writer out: {why}; use another store, or fencing=none if \
         no other process ever opens this volume"
    );
    requests.error(ErrorKind::Unsupported, "probe", "", &why)
}

fn key(prefix: &str, round: usize) -> String {
    format!("{prefix}{round:016x}")
}

fn body(racer: usize) -> Bytes {
    vec![racer as u8; BODY_BYTES].into()
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;
    use crate::memory_store::{Faults, MemoryStore, Random, TurnClock, yield_now};
    use crate::store::{Answer, Listed, Store, StoreError, StoreErrorKind};
    use crate::threads::block_on;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Wrong {
        Nothing,
        IgnoresConditions,
        ChecksBeforeItWrites,
        ListsLate,
        ListsBackwards,
        IgnoresMax,
        /// Not wrong: it refuses to do more than one at a time to an object.
        IsBusy,
    }

    /// A store that does one thing wrong.
    #[derive(Debug)]
    struct Odd {
        inner: MemoryStore,
        wrong: Wrong,
        busy: AtomicBool,
    }

    impl Store for Odd {
        fn create<'a>(&'a self, key: &'a str, body: Bytes) -> Answer<'a, Created> {
            match self.wrong {
                Wrong::IgnoresConditions => Box::pin(async move {
                    yield_now().await;
                    self.inner.put(key, Some(body));
                    Ok(Created::Made)
                }),
                Wrong::ChecksBeforeItWrites => Box::pin(async move {
                    if self.inner.object(key).is_some() {
                        return Ok(Created::Exists);
                    }
                    yield_now().await;
                    self.inner.put(key, Some(body));
                    Ok(Created::Made)
                }),
                Wrong::IsBusy => Box::pin(async move {
                    if !self.busy.swap(true, Relaxed) {
                        yield_now().await;
                        let made = self.inner.create(key, body).await;
                        self.busy.store(false, Relaxed);
                        return made;
                    }
                    Err(StoreError::new(StoreErrorKind::Busy, "429"))
                }),
                _ => self.inner.create(key, body),
            }
        }

        fn get<'a>(&'a self, key: &'a str, range: Range<u64>) -> Answer<'a, Bytes> {
            self.inner.get(key, range)
        }

        fn list<'a>(
            &'a self,
            prefix: &'a str,
            after: &'a str,
            max: usize,
        ) -> Answer<'a, Vec<Listed>> {
            Box::pin(async move {
                let asked = if self.wrong == Wrong::IgnoresMax { usize::MAX } else { max };
                let mut listed = self.inner.list(prefix, after, asked).await?;
                match self.wrong {
                    Wrong::ListsLate => drop(listed.pop()),
                    Wrong::ListsBackwards => listed.reverse(),
                    _ => {}
                }
                Ok(listed)
            })
        }

        fn delete<'a>(&'a self, key: &'a str) -> Answer<'a, ()> {
            self.inner.delete(key)
        }
    }

    fn probe(wrong: Wrong, faults: Faults, seed: u64) -> (Result<()>, Vec<String>) {
        let inner = MemoryStore::new(Arc::new(Random::new(seed)), faults);
        let store = Arc::new(Odd { inner, wrong, busy: AtomicBool::new(false) });
        let requests = Requests::new(Arc::clone(&store) as _, Arc::new(TurnClock), "v");
        let outcome = block_on(race(&requests, Incarnation([7; 16])));
        (outcome, store.inner.keys())
    }

    #[test]
    fn a_store_that_keeps_its_word_passes_also_when_answers_are_lost() {
        for seed in 0..40 {
            let faults = match seed % 2 {
                0 => Faults::default(),
                _ => Faults { late: 0, unanswered: 10, busy: 10 },
            };
            let wrong = if seed % 3 == 0 { Wrong::IsBusy } else { Wrong::Nothing };
            let (outcome, left) = probe(wrong, faults, seed);
            outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_eq!(left, [""; 0]);
        }
    }

    #[test]
    fn a_store_that_does_not_is_refused() {
        for (wrong, want) in [
            (Wrong::IgnoresConditions, "of 32 creations of one object at a time 32 succeeded"),
            (Wrong::ChecksBeforeItWrites, "at a time 32 succeeded"),
            (Wrong::ListsLate, "lacks an object"),
            (Wrong::ListsBackwards, "lacks an object"),
            (Wrong::IgnoresMax, "order of the keys"),
        ] {
            let (outcome, left) = probe(wrong, Faults::default(), 1);
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{wrong:?}: {error}");
            let text = error.to_string();
            assert!(text.contains(want) && text.contains("fencing=none"), "{wrong:?}: {text}");
            assert_eq!(left, [""; 0], "{wrong:?}");
        }
    }
}
