//! The table of requests in flight.

/// The identifier of a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cookie(u64);

impl Cookie {
    /// As it is on the wire.
    pub(super) fn from_wire(cookie: u64) -> Self {
        Self(cookie)
    }

    pub(super) fn to_wire(self) -> u64 {
        self.0
    }

    /// An index below the most requests in flight, which no other request in flight has.
    #[must_use]
    pub fn slot(self) -> usize {
        usize::try_from(self.0 >> 32).unwrap_or(usize::MAX)
    }

    fn new(slot: u32, turn: u32) -> Self {
        Self(u64::from(slot) << 32 | u64::from(turn))
    }

    fn turn(self) -> u32 {
        (self.0 & u64::from(u32::MAX)) as u32
    }
}

/// Requests in flight, found by their cookies.
#[derive(Debug)]
pub(super) struct InFlight<P> {
    max: usize,
    slots: Vec<Slot<P>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<P> {
    /// Distinguishes successive requests in this slot; counts from 1.
    turn: u32,
    pending: Option<P>,
}

impl<P> InFlight<P> {
    pub(super) fn new(max: usize) -> Self {
        Self { max, slots: Vec::new(), free: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn has_room(&self) -> bool {
        self.len() < self.max
    }

    /// The cookie of the next request, which [`InFlight::insert`] takes; `None` when there is no
    /// room.
    #[inline]
    pub(super) fn next_cookie(&mut self) -> Option<Cookie> {
        if self.free.is_empty() {
            let slot = u32::try_from(self.slots.len()).ok().filter(|_| self.has_room())?;
            self.slots.push(Slot { turn: 0, pending: None });
            self.free.push(slot);
        }
        let slot = *self.free.last()?;
        let turn = self.slots[slot as usize].turn.wrapping_add(1).max(1);
        Some(Cookie::new(slot, turn))
    }

    #[inline]
    pub(super) fn insert(&mut self, cookie: Cookie, pending: P) {
        let slot = self.free.pop().map(|slot| slot as usize);
        debug_assert_eq!(slot, Some(cookie.slot()), "the cookie is the next one");
        self.slots[cookie.slot()] = Slot { turn: cookie.turn(), pending: Some(pending) };
    }

    #[inline]
    pub(super) fn get(&self, cookie: Cookie) -> Option<&P> {
        let slot = self.slots.get(cookie.slot())?;
        slot.pending.as_ref().filter(|_| slot.turn == cookie.turn())
    }

    #[inline]
    pub(super) fn get_mut(&mut self, cookie: Cookie) -> Option<&mut P> {
        let slot = self.slots.get_mut(cookie.slot())?;
        slot.pending.as_mut().filter(|_| slot.turn == cookie.turn())
    }

    #[inline]
    pub(super) fn remove(&mut self, cookie: Cookie) -> Option<P> {
        let slot = self.slots.get_mut(cookie.slot())?;
        let pending = slot.pending.take_if(|_| slot.turn == cookie.turn())?;
        self.free.push((cookie.0 >> 32) as u32);
        Some(pending)
    }

    /// Whether the cookie belongs to a request that is no longer in flight.
    pub(super) fn has_ended(&self, cookie: Cookie) -> bool {
        let slot = self.slots.get(cookie.slot());
        self.get(cookie).is_none()
            && slot.is_some_and(|slot| (1..=slot.turn).contains(&cookie.turn()))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &P> {
        self.slots.iter().filter_map(|slot| slot.pending.as_ref())
    }

    /// Empties the table.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (Cookie, P)> {
        self.free.clear();
        let slots = std::mem::take(&mut self.slots).into_iter().zip(0_u32..);
        slots.filter_map(|(slot, index)| Some((Cookie::new(index, slot.turn), slot.pending?)))
    }
}
