//! Admission policy: which clients hold a slot, and which client is evicted.
//!
//! There are two bounds: on clients that negotiate, and on connections in all. A listener holds one
//! client beyond them; the others stay in the listen queue of the kernel. The rules:
//!
//! - When no slot is free, the negotiating client that has been silent for longest gives way to a
//!   new one, once it has been silent for [`SILENT_MIN_MS`]. Established connections never do.
//! - One address holds at most seven eighths of the slots of either bound. At its share, a new
//!   client of that address takes the slot of a silent one of the same address. If there is none,
//!   it waits for a slot among those that negotiate, but all clients of one address together for at
//!   most [`PATIENCE_MS`], since other clients queue behind them; then it is closed.
//!
//! This module does no I/O and has no clock; times are milliseconds since the server's start.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A client is silent when no byte has moved in either direction for this long: much longer than a
/// round trip takes, also to a client on a busy machine.
pub(crate) const SILENT_MIN_MS: u64 = 3000;
/// How long a listener waits for slots of one address. Each handshake that this address completes
/// meanwhile adds a millisecond.
pub(crate) const PATIENCE_MS: u64 = 3000;
/// The least time between two lines of the log.
pub(crate) const REPORT_INTERVAL_MS: u64 = 1000;

/// A source of clients; each source gets at most its share of the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// The network of an IPv6 address: its first 64 bits belong to one site (RFC 4291, 2.5.4).
    V6(u64),
    /// The user at the other end of a unix socket.
    User(u32),
    /// The client left before its address was read.
    Unknown,
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        // A socket for both families maps IPv4 addresses into IPv6.
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => Self::V6((u128::from(address) >> 64) as u64),
        }
    }
}

/// The policy and its state. `H` ends the client that gives way.
pub(crate) struct Admission<H> {
    bounds: Bounds,
    /// Ids grow with the time of admission.
    next: u64,
    negotiating: BTreeMap<u64, Negotiating<H>>,
    established: usize,
    sources: HashMap<Source, Usage>,
    events: Events,
    reported_ms: Option<u64>,
}

/// The most clients at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Clients that have not negotiated yet.
    pub(crate) negotiating: usize,
    /// Clients in all.
    pub(crate) connections: usize,
}

/// When a client last sent or took a byte, in milliseconds. Written by its stream.
pub(crate) type Moved = Arc<AtomicU64>;

struct Negotiating<H> {
    source: Source,
    moved: Moved,
    /// Absent until [`Admission::attach`].
    handle: Option<H>,
}

#[derive(Default)]
struct Usage {
    negotiating: usize,
    established: usize,
    /// The time until which a client of an address at its share may wait.
    patience_until: Option<u64>,
}

/// What to do with a new client.
#[derive(Debug)]
pub(crate) enum Verdict<H> {
    /// It has a slot, for which another client may have been evicted.
    In { id: u64, evicted: Option<H> },
    /// No slot is free. Ask again when one is, or at this time, when a client may count as silent.
    Full(Option<u64>),
    /// Its address has its share. Ask again when a slot is free, or at this time at the latest.
    OverShare(u64),
    /// Close it: its address has its share.
    Refused,
}

/// Events since the last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Events {
    /// Silent clients that gave way.
    pub(crate) silent_closed: u64,
    /// New clients that were closed, since their address has its share.
    pub(crate) over_share_closed: u64,
    /// Times that a listener waited for a slot.
    pub(crate) paused: u64,
}

/// The most slots of one address: seven eighths.
fn share(bound: usize) -> usize {
    bound - bound / 8
}

impl<H> Admission<H> {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            next: 0,
            negotiating: BTreeMap::new(),
            established: 0,
            sources: HashMap::new(),
            events: Events::default(),
            reported_ms: None,
        }
    }

    /// Clients that negotiate, and connections that are served.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.negotiating.len(), self.established)
    }

    /// Counts a listener that waits for a slot.
    pub(crate) fn paused(&mut self) {
        self.events.paused += 1;
    }

    /// Decides about a client that was accepted. `moved` is the time of its last byte.
    pub(crate) fn admit(&mut self, source: Source, moved: &Moved, now: u64) -> Verdict<H> {
        let limits = self.bounds;
        let usage = self.sources.entry(source).or_default();
        let (negotiating, total) = (usage.negotiating, usage.negotiating + usage.established);
        let at_share = total >= share(limits.connections);
        let at_negotiating_share = negotiating >= share(limits.negotiating);
        let over_share = at_share || at_negotiating_share;
        if !over_share && !self.is_full() {
            return self.insert(source, moved, None);
        }
        // An address at its share takes nothing from others.
        let among = over_share.then_some(source);
        let victim = self.longest_silent(among).filter(|(_, last)| last + SILENT_MIN_MS <= now);
        if let Some((victim, _)) = victim {
            let evicted = self.evict(victim);
            return self.insert(source, moved, evicted);
        }
        let silent_at = |longest: Option<(u64, u64)>| longest.map(|(_, last)| last + SILENT_MIN_MS);
        let next_silent = silent_at(self.longest_silent(None));
        if !over_share || (self.is_full() && next_silent.is_none_or(|at| at > now)) {
            // A bound of 0 admits no client.
            self.forget_if_idle(source);
            return Verdict::Full(next_silent);
        }
        // Established connections may stay for ever, so waiting for one of them is of no use.
        let patience = if at_share { 0 } else { PATIENCE_MS };
        let usage = self.sources.entry(source).or_default();
        let until = *usage.patience_until.get_or_insert(now + patience);
        if at_share || until <= now {
            self.events.over_share_closed += 1;
            self.forget_if_idle(source);
            return Verdict::Refused;
        }
        // A client of the same address may count as silent before.
        let own_silent = silent_at(self.longest_silent(among));
        Verdict::OverShare(own_silent.map_or(until, |at| at.min(until)))
    }

    /// Gives a slot the handle that ends its client. False when the slot is gone already.
    pub(crate) fn attach(&mut self, id: u64, handle: H) -> bool {
        match self.negotiating.get_mut(&id) {
            Some(slot) => slot.handle = Some(handle),
            None => return false,
        }
        true
    }

    /// Takes the slot of the client that has been silent for longest, if that is long enough.
    pub(crate) fn evict_silent(&mut self, now: u64) -> Option<H> {
        let (victim, moved) = self.longest_silent(None)?;
        if moved + SILENT_MIN_MS > now {
            return None;
        }
        self.evict(victim)
    }

    /// A client has negotiated. False when it has lost its slot.
    pub(crate) fn establish(&mut self, id: u64, now: u64) -> bool {
        let Some(slot) = self.negotiating.remove(&id) else { return false };
        let usage = self.sources.entry(slot.source).or_default();
        usage.negotiating -= 1;
        usage.established += 1;
        self.established += 1;
        self.completed(slot.source, now);
        true
    }

    /// A client ends before it has negotiated; `in_order` if it ended without an error.
    pub(crate) fn leave(&mut self, id: u64, in_order: bool, now: u64) {
        let Some(slot) = self.negotiating.remove(&id) else { return };
        self.sources.entry(slot.source).or_default().negotiating -= 1;
        if in_order {
            self.completed(slot.source, now);
        }
        self.forget_if_idle(slot.source);
    }

    /// An established connection of this address ends.
    pub(crate) fn closed(&mut self, source: Source) {
        self.established -= 1;
        self.sources.entry(source).or_default().established -= 1;
        self.forget_if_idle(source);
    }

    /// The events to log now, at most once in [`REPORT_INTERVAL_MS`].
    pub(crate) fn report(&mut self, now: u64) -> Option<Events> {
        if self.report_due()? > now {
            return None;
        }
        self.reported_ms = Some(now);
        Some(std::mem::take(&mut self.events))
    }

    /// When [`Admission::report`] has events to log.
    pub(crate) fn report_due(&self) -> Option<u64> {
        if self.events == Events::default() {
            return None;
        }
        Some(self.reported_ms.map_or(0, |at| at + REPORT_INTERVAL_MS))
    }

    fn is_full(&self) -> bool {
        let negotiating = self.negotiating.len();
        negotiating >= self.bounds.negotiating
            || negotiating + self.established >= self.bounds.connections
    }

    /// The client that has been silent for longest, of all or of one address, and the time of its
    /// last byte.
    fn longest_silent(&self, source: Option<Source>) -> Option<(u64, u64)> {
        let slots = self.negotiating.iter();
        let slots = slots.filter(|(_, slot)| source.is_none_or(|of| of == slot.source));
        slots.map(|(&id, slot)| (id, slot.moved.load(Relaxed))).min_by_key(|&(_, moved)| moved)
    }

    fn insert(&mut self, source: Source, moved: &Moved, evicted: Option<H>) -> Verdict<H> {
        let id = self.next;
        self.next += 1;
        let slot = Negotiating { source, moved: Arc::clone(moved), handle: None };
        self.negotiating.insert(id, slot);
        self.sources.entry(source).or_default().negotiating += 1;
        Verdict::In { id, evicted }
    }

    fn evict(&mut self, id: u64) -> Option<H> {
        let slot = self.negotiating.remove(&id)?;
        self.sources.entry(slot.source).or_default().negotiating -= 1;
        self.forget_if_idle(slot.source);
        self.events.silent_closed += 1;
        slot.handle
    }

    /// A handshake was completed, which shows that waiting for this address pays.
    fn completed(&mut self, source: Source, now: u64) {
        let Some(usage) = self.sources.get_mut(&source) else { return };
        if let Some(until) = &mut usage.patience_until {
            *until = (*until).max(now).saturating_add(1).min(now + PATIENCE_MS);
        }
        self.forget_if_idle(source);
    }

    /// An address with less than half of its share is waited for again, and one without clients
    /// costs no memory.
    fn forget_if_idle(&mut self, source: Source) {
        let half = (share(self.bounds.negotiating) / 2).max(1);
        let Some(usage) = self.sources.get_mut(&source) else { return };
        if usage.negotiating < half {
            usage.patience_until = None;
        }
        if usage.negotiating + usage.established == 0 && usage.patience_until.is_none() {
            self.sources.remove(&source);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Source = Source::User(1);
    const B: Source = Source::User(2);

    /// Sixteen slots for those that negotiate, of which one address gets fourteen.
    fn admission(connections: usize) -> Admission<u64> {
        Admission::new(Bounds { negotiating: 16, connections })
    }

    fn at(now: u64) -> Moved {
        Arc::new(AtomicU64::new(now))
    }

    /// Admits a client whose last byte moved now, and returns its id and the handle that lost.
    fn enter(admission: &mut Admission<u64>, source: Source, now: u64) -> (u64, Option<u64>) {
        match admission.admit(source, &at(now), now) {
            Verdict::In { id, evicted } => {
                assert!(admission.attach(id, id));
                (id, evicted)
            }
            other => panic!("{other:?}"),
        }
    }

    fn fill(admission: &mut Admission<u64>, source: Source, count: u64, now: u64) -> Vec<u64> {
        (0..count).map(|_| enter(admission, source, now).0).collect()
    }

    #[test]
    fn a_full_server_lets_clients_wait_until_a_client_is_silent_or_ends() {
        let mut admission = admission(100);
        let held = fill(&mut admission, A, 14, 5);
        fill(&mut admission, B, 2, 7);
        assert!(matches!(admission.admit(B, &at(900), 900), Verdict::Full(Some(3005))));
        admission.leave(held[3], true, 900);
        assert_eq!(enter(&mut admission, B, 900).1, None);
        assert_eq!(enter(&mut admission, B, 3005).1, Some(held[0]), "the oldest is silent by now");
        assert_eq!(admission.counts(), (16, 0));
    }

    #[test]
    fn the_client_that_was_silent_for_longest_gives_way() {
        let mut admission = admission(100);
        let moved: Vec<_> = (0..14).map(|now| at(10 + now)).collect();
        let mut ids = Vec::new();
        for moved in &moved {
            let Verdict::In { id, .. } = admission.admit(A, moved, 10) else { panic!("room") };
            assert!(admission.attach(id, id));
            ids.push(id);
        }
        fill(&mut admission, B, 2, 30);
        // The first two have moved bytes since.
        moved[0].store(500, Relaxed);
        moved[1].store(501, Relaxed);
        assert_eq!(enter(&mut admission, B, 3012).1, Some(ids[2]));
        assert!(!admission.establish(ids[2], 3012), "its slot is gone");
        assert!(!admission.attach(ids[2], 0));
        assert!(matches!(admission.admit(B, &at(3012), 3012), Verdict::Full(Some(3013))));
        assert_eq!(admission.evict_silent(3012), None);
        assert_eq!(admission.evict_silent(3013), Some(ids[3]));
        assert_eq!(admission.report(3013).map(|events| events.silent_closed), Some(2));
    }

    #[test]
    fn an_address_at_its_share_takes_from_itself_only() {
        let mut admission = admission(100);
        fill(&mut admission, B, 1, 0);
        let own = fill(&mut admission, A, 14, 500);
        // The one of B has been silent for longer.
        assert!(matches!(admission.admit(A, &at(3200), 3200), Verdict::OverShare(3500)));
        assert_eq!(enter(&mut admission, A, 3500).1, Some(own[0]));
        assert_eq!(enter(&mut admission, B, 3500).1, None, "the last slot is for others");
    }

    #[test]
    fn patience_with_one_address_ends_unless_it_completes_handshakes() {
        let mut admission = admission(100);
        let moved: Vec<_> = (0..14).map(|_| at(0)).collect();
        let ids: Vec<_> = moved
            .iter()
            .map(|moved| match admission.admit(A, moved, 0) {
                Verdict::In { id, .. } => id,
                other => panic!("{other:?}"),
            })
            .collect();
        let hear = |now| moved.iter().for_each(|moved| moved.store(now, Relaxed));
        hear(100);
        assert!(matches!(admission.admit(A, &at(200), 200), Verdict::OverShare(3100)));
        hear(3100);
        assert!(matches!(admission.admit(A, &at(3199), 3199), Verdict::OverShare(3200)));
        // A millisecond more for one that has negotiated.
        assert!(admission.establish(ids[0], 3199));
        enter(&mut admission, A, 3199);
        assert!(matches!(admission.admit(A, &at(3200), 3200), Verdict::OverShare(3201)));
        assert!(matches!(admission.admit(A, &at(3201), 3201), Verdict::Refused));
        assert!(matches!(admission.admit(B, &at(3201), 3201), Verdict::In { .. }));
        // With half of its slots free again, it is waited for again.
        ids[1..9].iter().for_each(|&id| admission.leave(id, false, 3300));
        hear(3300);
        fill(&mut admission, A, 8, 3300);
        assert!(matches!(admission.admit(A, &at(3300), 3300), Verdict::OverShare(6199)));
    }

    #[test]
    fn established_connections_count_and_stay() {
        let mut admission = admission(16);
        for _ in 0..14 {
            let (id, _) = enter(&mut admission, A, 0);
            assert!(admission.establish(id, 0));
        }
        assert!(matches!(admission.admit(A, &at(9000), 9000), Verdict::Refused));
        assert_eq!(enter(&mut admission, B, 9000).1, None);
        let (id, _) = enter(&mut admission, B, 9000);
        assert!(admission.establish(id, 9000));
        assert!(matches!(admission.admit(B, &at(9000), 9000), Verdict::Full(Some(12_000))));
        admission.closed(A);
        assert_eq!(enter(&mut admission, A, 9000).1, None);
        assert_eq!(admission.counts(), (2, 14));
    }

    #[test]
    fn the_log_gets_a_line_a_second() {
        let mut admission = admission(100);
        assert_eq!((admission.report(0), admission.report_due()), (None, None));
        admission.paused();
        let one = Events { paused: 1, ..Events::default() };
        assert_eq!(admission.report(10), Some(one));
        admission.paused();
        admission.paused();
        assert_eq!((admission.report(1009), admission.report_due()), (None, Some(1010)));
        assert_eq!(admission.report(1010), Some(Events { paused: 2, ..Events::default() }));
    }

    #[test]
    fn addresses_share_by_what_one_site_has() {
        let source = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(source("2001:db8::1"), source("2001:db8:0:0:ffff::2"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
        assert_ne!(source("192.0.2.2"), source("192.0.2.1"));
    }

    #[test]
    fn addresses_without_clients_are_forgotten() {
        let mut admission = admission(100);
        let first = fill(&mut admission, A, 1, 0)[0];
        let second = fill(&mut admission, B, 1, 0)[0];
        admission.leave(first, false, 0);
        assert!(admission.establish(second, 0));
        admission.closed(B);
        assert!(admission.sources.is_empty());
    }
}
