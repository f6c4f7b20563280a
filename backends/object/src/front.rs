//! The state of an open volume, behind one lock: what is where, and the ops that wait for the
//! journal. It does no I/O and waits for nothing. Backends and the worker act on it.

mod back;
mod flush;
mod parts;
mod reads;
mod streams;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Release};
use std::task::Waker;

use sheave_core::{Error, ErrorKind, Result};
use slab::Slab;

pub(crate) use back::NextBatch;
use flush::Flushes;
pub(crate) use parts::{By, Effects, Fetch, Journal, Limits, Mail, News, Sync, Whereabouts};
use parts::{Flush, Loads, Pending, User};
use streams::Streams;

use crate::ask::Ask;
use crate::extents::Span;
use crate::format::Durability;
use crate::format::record::Entry;
use crate::ids::{Lsn, Place};
use crate::journal::{Replayed, Reserved};
use crate::map::Map;
use crate::recent::{Fresh, Recent};
use crate::upload::JournalPlace;

const ENTERED: &str = "a user that has entered and not left";

/// Why ops fail from now on.
#[derive(Clone, Debug)]
struct Failure {
    kind: ErrorKind,
    why: String,
}

pub(crate) struct Front {
    name: Arc<str>,
    limits: Limits,
    log: Journal,
    recent: Recent,
    map: Map,
    /// By numbers that are not used again: news may come for a user that is gone.
    users: BTreeMap<usize, User>,
    next_user: usize,
    /// The user that is acting, which takes its mail itself.
    acting: Option<usize>,
    flushes: Flushes,
    durability: Durability,
    /// A sync of a backend goes on.
    is_syncing: bool,
    /// A user waits for room in the journal.
    is_short: bool,
    /// Its disk had no room for one more segment, lately.
    is_disk_full: bool,
    /// One more is being made.
    is_making: bool,
    is_shut: bool,
    failure: Option<Failure>,
    /// What the worker fetches blocks for: user, job, offset in its buffer.
    fetching: Slab<(usize, usize, usize)>,
    fetches: Vec<Fetch>,
    streams: Streams,
    /// What is to be in the cache soon.
    ahead: Vec<(Span, Place)>,
    loads: Loads,
    /// For how many ticks of the worker no reading came while leaves were in memory.
    unread_ticks: u32,
    /// The worker sleeps until it is roused: everything is durable and sealed.
    is_quiet: bool,
    /// For how many ticks of the worker there have been unsealed writes.
    unsealed_ticks: u32,
    /// The uploads wait for a batch, or for something that is asked.
    uploads: Option<Waker>,
    /// What is asked of the uploads.
    asks: VecDeque<Ask>,
    is_closing: bool,
    /// What the store said last, if it does not do what it is asked.
    complaint: Option<String>,
    pub(crate) effects: Effects,
}

impl Front {
    /// The state of a volume just opened, with the writes that its journal had.
    pub(crate) fn new(
        name: Arc<str>,
        (limits, durability): (Limits, Durability),
        map: Map,
        (journal, records): (Journal, &[Replayed]),
    ) -> Self {
        let mut recent = Recent::new(journal.committed(), limits.seal_bytes);
        for record in records {
            recent.add(record.lsn, record.span, fresh(record.segment, record.record));
        }
        Self {
            name,
            limits,
            log: journal,
            recent,
            map,
            users: BTreeMap::new(),
            next_user: 0,
            acting: None,
            flushes: Flushes::default(),
            durability,
            is_syncing: false,
            is_short: false,
            is_disk_full: false,
            is_making: false,
            is_shut: false,
            failure: None,
            fetching: Slab::new(),
            fetches: Vec::new(),
            streams: Streams::new(limits.ahead_blocks_max),
            ahead: Vec::new(),
            loads: Loads::default(),
            unread_ticks: 0,
            is_quiet: true,
            unsealed_ticks: 0,
            uploads: None,
            asks: VecDeque::new(),
            is_closing: false,
            complaint: None,
            effects: Effects::default(),
        }
    }

    /// Adds a backend. `has_news` is set whenever [`Self::take_mail`] has something.
    pub(crate) fn enter(&mut self, has_news: Arc<AtomicBool>) -> usize {
        let user = self.next_user;
        self.next_user += 1;
        self.users.insert(user, User { has_news, ..User::default() });
        user
    }

    /// Removes it. `is_lost`: requests of the journal that it has started will not be reported.
    pub(crate) fn leave(&mut self, user: usize, is_lost: bool) {
        if is_lost {
            self.poison("a thread that wrote to the journal has ended");
        }
        self.users.remove(&user);
        self.flushes.leave(user);
        // The others may wait for a sync that it was about to start.
        self.wake_flushes();
    }

    /// Sets which user acts, and how to wake it later.
    pub(crate) fn act(&mut self, user: usize, waker: impl FnOnce() -> Waker) {
        self.acting = Some(user);
        let user = self.users.get_mut(&user).expect(ENTERED);
        if user.waker.is_none() {
            user.waker = Some(waker());
        }
    }

    /// Nothing acts any more.
    pub(crate) fn rest(&mut self) {
        self.acting = None;
    }

    /// Refuses writing ops of a volume that has failed.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        match &self.failure {
            None if self.is_closing => Err(self.closed(op)),
            None => Ok(()),
            Some(Failure { kind, why }) => {
                Err(Error::new(*kind, op, format!("{}: {why}", self.name)))
            }
        }
    }

    /// Refuses reads of a volume that another node has taken over: it has newer data. And of one
    /// that is closed, whose journal is given up.
    pub(crate) fn check_read(&self, op: &'static str) -> Result<()> {
        if self.is_shut {
            return Err(self.closed(op));
        }
        let is_fenced = |failure: &&Failure| failure.kind == ErrorKind::Fenced;
        self.failure.as_ref().filter(is_fenced).map_or(Ok(()), |_| self.check(op))
    }

    fn closed(&self, op: &'static str) -> Error {
        let why = format!("{}: is being closed; open it again", self.name);
        Error::new(ErrorKind::Shutdown, op, why)
    }

    /// Whether data that was written may be lost.
    pub(crate) fn has_lost(&self) -> bool {
        self.failure.is_some()
    }

    /// The journal.
    pub(crate) fn log(&self) -> &Journal {
        &self.log
    }

    /// What the bucket lacks.
    pub(crate) fn recent(&self) -> &Recent {
        &self.recent
    }

    /// Whether the store has been asked for something.
    pub(crate) fn has_asked_store(&self) -> bool {
        self.recent.has_sealed() || !self.fetching.is_empty()
    }

    /// A place in the journal for a record of that job, which must be written and reported to
    /// [`Self::wrote`]; `None` without room, and the user has news when there may be some.
    ///
    /// # Errors
    /// When the volume has failed.
    pub(crate) fn append(
        &mut self,
        op: &'static str,
        owner: (usize, usize),
        entry: &Entry,
    ) -> Result<Option<Reserved>> {
        self.check(op)?;
        let reserved = self.reserve(Some(owner), entry);
        if reserved.is_none() {
            self.users.get_mut(&owner.0).expect(ENTERED).wants_room = true;
            self.is_short = true;
            self.make_room();
            self.effects.rouse = true;
        }
        Ok(reserved)
    }

    fn reserve(&mut self, owner: Option<(usize, usize)>, entry: &Entry) -> Option<Reserved> {
        let reserved = self.log.reserve(entry, |reserved| {
            let record = matches!(entry, Entry::Write { .. }).then_some(reserved.page);
            let fresh = fresh(reserved.segment.header.number, record);
            Pending { owner, span: entry.span(), fresh }
        })?;
        if reserved.is_first && self.needs_segment() {
            self.effects.rouse = true;
        }
        Some(reserved)
    }

    /// Whether writes to the journal's disk wait for a sync of this volume, and so may be slow.
    pub(crate) fn is_syncing(&self) -> bool {
        self.is_syncing
    }

    /// A record is written.
    pub(crate) fn wrote(&mut self, lsn: Lsn) {
        if self.failure.is_some() {
            return;
        }
        self.log.wrote(lsn);
        let mut has_sealed = false;
        while let Some((lsn, Pending { owner, span, fresh })) = self.log.next_written() {
            has_sealed |= self.recent.add(lsn, span, fresh);
            if let Some((user, job)) = owner {
                self.post(user, Mail { job, news: News::Written });
            }
        }
        if has_sealed {
            self.offer_batch();
        }
        self.make_room();
        if self.is_closing {
            self.offer_batch();
        }
        if self.is_quiet {
            self.is_quiet = false;
            self.effects.rouse = true;
        }
    }

    /// A record could not be written.
    pub(crate) fn not_written(&mut self, why: &str) {
        self.poison(&format!("the journal could not be written ({why})"));
    }

    /// Where the blocks of a span are, in order.
    pub(crate) fn resolve(&self, span: Span) -> Vec<(Span, Whereabouts)> {
        let mut parts = Vec::new();
        self.recent.cover(span, &mut |span, fresh| match fresh {
            Some(Fresh::Zero) => parts.push((span, Whereabouts::Zero)),
            Some(Fresh::Journal(JournalPlace { segment, page })) => {
                let segment = self.log.segment(segment).expect("a segment of what is recent");
                parts.push((span, Whereabouts::Journal(Arc::clone(segment), page)));
            }
            None => parts.extend(
                self.map
                    .cover(span)
                    .into_iter()
                    .map(|(span, found)| (span, Whereabouts::of(found))),
            ),
        });
        parts
    }

    /// Moves a user's mail to the end of `into`.
    pub(crate) fn take_mail(&mut self, user: usize, into: &mut Vec<Mail>) {
        into.append(&mut self.users.get_mut(&user).expect(ENTERED).mail);
    }

    fn post(&mut self, user: usize, mail: Mail) {
        let Some(to) = self.users.get_mut(&user) else { return };
        to.mail.push(mail);
        self.notify(user);
    }

    fn notify(&mut self, user: usize) {
        let Some(to) = self.users.get_mut(&user) else { return };
        to.has_news.store(true, Release);
        if self.acting != Some(user) {
            self.effects.wakes.extend(to.waker.clone());
        }
    }

    /// Has the bucket take what is in the journal, if a user waits for that.
    fn make_room(&mut self) {
        if self.is_short && !self.recent.has_sealed() {
            self.seal();
        }
    }

    /// There may be room in the journal.
    fn has_room(&mut self) {
        self.is_short = false;
        let wants =
            |(&key, user): (&usize, &mut User)| std::mem::take(&mut user.wants_room).then_some(key);
        let waiting: Vec<_> = self.users.iter_mut().filter_map(wants).collect();
        waiting.into_iter().for_each(|user| self.notify(user));
    }

    /// A free segment serves again only when nothing reads or syncs it any more, so writes that
    /// wait try again after each sync and at each tick.
    pub(super) fn look_for_room(&mut self) {
        if self.is_short {
            self.has_room();
        }
    }

    fn poison(&mut self, why: &str) {
        let why = format!(
            "{why}, so data written before may be lost; look at the disk, then open the volume \
             again"
        );
        self.fail(ErrorKind::Io, why);
    }

    /// Ops fail from now on.
    fn fail(&mut self, kind: ErrorKind, why: String) {
        if self.failure.is_some() {
            return;
        }
        tracing::error!(volume = &*self.name, "{why}");
        self.failure = Some(Failure { kind, why });
        self.asks.clear();
        let Err(error) = self.check("write") else { return };
        let mut owners: Vec<_> = self.log.unwritten().filter_map(|of| of.owner).collect();
        owners.extend(self.flushes.take_all());
        for (user, job) in owners {
            self.post(user, Mail { job, news: News::Failed(error.clone()) });
        }
        self.has_room();
        self.effects.rouse = true;
    }
}

/// Where the blocks of a record are.
fn fresh(segment: u64, record: Option<u32>) -> Fresh {
    record.map_or(Fresh::Zero, |record| Fresh::Journal(JournalPlace { segment, page: record + 1 }))
}
