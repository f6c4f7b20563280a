//! Rules by which requests fail.

use std::time::Duration;

use crate::log::Kind;
use crate::random::Random;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Effect {
    /// 500 InternalError; nothing is done.
    InternalError,
    /// 503 SlowDown; nothing is done.
    SlowDown,
    /// 409 ConditionalRequestConflict; nothing is done.
    Conflict,
    /// 403 AccessDenied; nothing is done.
    AccessDenied,
    /// The connection is reset; nothing is done.
    ResetBefore,
    /// The request is done, then the connection is reset: its answer is lost.
    ResetAfter,
    /// No answer for as long as the client waits; nothing is done.
    HangBefore,
    /// The request is done; no answer for as long as the client waits.
    HangAfter,
    /// The connection is reset, and the request is done so much later.
    Late(Duration),
    /// The answer begins so much later.
    Delay(Duration),
    /// The body of the answer ends in its middle, and the connection with it.
    Truncate,
    /// One bit of the answer's body is another.
    Corrupt,
}

/// A rule: which requests, when, what happens.
#[derive(Clone, Debug)]
pub struct Fault {
    effect: Effect,
    kind: Option<Kind>,
    key_part: String,
    when: When,
    times: u64,
    seen: u64,
}

#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    Nth(u64),
    Every(u64),
    Share(f64),
}

impl Fault {
    /// Happens to every request, until it is limited.
    #[must_use]
    pub fn new(effect: Effect) -> Self {
        let key_part = String::new();
        Self { effect, kind: None, key_part, when: When::Always, times: u64::MAX, seen: 0 }
    }

    /// To requests of one kind only.
    #[must_use]
    pub fn on(self, kind: Kind) -> Self {
        Self { kind: Some(kind), ..self }
    }

    /// To requests whose key, or the prefix of whose list, has this text in it.
    #[must_use]
    pub fn key(self, part: impl Into<String>) -> Self {
        Self { key_part: part.into(), ..self }
    }

    /// To one request only: the first is number 1.
    #[must_use]
    pub fn nth(self, number: u64) -> Self {
        Self { when: When::Nth(number), ..self }
    }

    /// To each request whose number is a multiple of this.
    #[must_use]
    pub fn every(self, count: u64) -> Self {
        Self { when: When::Every(count.max(1)), ..self }
    }

    /// To this share of the requests, at random by the seed.
    #[must_use]
    pub fn share(self, share: f64) -> Self {
        Self { when: When::Share(share), ..self }
    }

    /// No more often than this.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    fn strikes(&mut self, kind: Kind, key: &str, random: &mut Random) -> Option<Effect> {
        let is_meant = self.kind.is_none_or(|meant| meant == kind) && key.contains(&self.key_part);
        if !is_meant || self.times == 0 {
            return None;
        }
        self.seen += 1;
        let strikes = match self.when {
            When::Always => true,
            When::Nth(number) => self.seen == number,
            When::Every(count) => self.seen.is_multiple_of(count),
            When::Share(share) => random.share() < share,
        };
        self.times -= u64::from(strikes);
        strikes.then_some(self.effect)
    }
}

/// All rules in force. The first one that strikes decides; each counts all requests.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    rules: Vec<Fault>,
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault) {
        self.rules.push(fault);
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }

    pub(crate) fn strike(&mut self, kind: Kind, key: &str, random: &mut Random) -> Option<Effect> {
        let struck = self.rules.iter_mut().map(|rule| rule.strikes(kind, key, random));
        // All rules are asked, so that each has counted the request.
        struck.fold(None, Option::or)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn struck(fault: Fault, keys: &[&str]) -> Vec<usize> {
        let mut faults = Faults::default();
        faults.add(fault);
        let mut random = Random::new(7);
        let strikes = |(index, key): (usize, &&str)| {
            faults.strike(Kind::Put, key, &mut random).map(|_| index)
        };
        keys.iter().enumerate().filter_map(strikes).collect()
    }

    #[test]
    fn rules_choose_requests() {
        let keys = ["log/1", "root/1", "log/2", "log/3", "log/4", "log/5"];
        let log = || Fault::new(Effect::SlowDown).key("log/");
        assert_eq!(struck(log(), &keys), [0, 2, 3, 4, 5]);
        assert_eq!(struck(log().nth(2), &keys), [2]);
        assert_eq!(struck(log().every(2), &keys), [2, 4]);
        assert_eq!(struck(log().every(2).times(1), &keys), [2]);
        assert_eq!(struck(log().on(Kind::Get), &keys), [0; 0]);
        assert_eq!(struck(log().share(0.0), &keys), [0; 0]);
        let many = ["log/"; 1000];
        let share = struck(log().share(0.25), &many).len();
        assert!((200..300).contains(&share), "{share} of 1000");
    }
}
