//! The exports of a server. The set is replaced as a whole; a handshake keeps the set that it began
//! with.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ServerConfig as TlsConfig;
use sheave_core::{Error, ErrorKind, Volume, printable};
use sheave_proto::{ExportInfo, Exports, TlsMode};
use sheave_telemetry::Registry;
use tokio_rustls::TlsAcceptor;

use crate::access::{Access, Client};
use crate::connections::{ClientSnapshot, Connection, Users};

/// The longest name and the longest description of an export, in bytes (proto.md, "String
/// values").
pub const STRING_LEN_MAX: usize = sheave_proto::STRING_LEN_MAX;

/// A volume under a name.
#[derive(Clone)]
pub struct Export {
    /// The name that clients use.
    pub name: String,
    /// Shown to clients that list exports; may be empty.
    pub description: String,
    /// The volume.
    pub volume: Arc<dyn Volume>,
    /// Which clients may use it. It is hidden from others.
    pub access: Access,
    /// The most connections at a time; more are refused.
    pub connections_max: Option<usize>,
}

/// An export for statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSnapshot {
    /// As in [`Export`].
    pub name: String,
    /// As in [`Export`].
    pub description: String,
    /// Bytes that a client which connects now can use.
    pub size: u64,
    /// Whether all writes are refused.
    pub read_only: bool,
    /// As in [`Export`].
    pub connections_max: Option<usize>,
    /// Its connections, the oldest first.
    pub clients: Vec<ClientSnapshot>,
}

/// The exports of a running server, shared by the server and readers of its statistics.
#[derive(Clone)]
pub struct LiveExports(Arc<Mutex<ExportState>>);

/// The exports and the TLS configuration at a moment.
#[derive(Clone)]
pub(crate) struct ExportState {
    pub(crate) exports: Arc<ExportSet>,
    pub(crate) tls: Option<TlsAcceptor>,
}

/// The exports at a moment.
pub(crate) struct ExportSet {
    offered: Vec<LiveExport>,
    /// Positions by hash of the name. The key of the hash is random, so that the time of a search
    /// reveals nothing about names.
    by_hash: Vec<(u64, usize)>,
    hasher: RandomState,
}

/// An export, and its volume's connections and counters.
pub(crate) struct LiveExport {
    pub(crate) export: Export,
    pub(crate) users: Arc<Users>,
}

/// The exports that one client may use.
pub(crate) struct View<'a> {
    pub(crate) set: &'a ExportSet,
    pub(crate) client: &'a Client,
}

impl LiveExports {
    pub(crate) fn new(exports: ExportSet, tls: Option<Arc<TlsConfig>>) -> Self {
        let state = ExportState { exports: Arc::new(exports), tls: tls.map(TlsAcceptor::from) };
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn current(&self) -> ExportState {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces all exports and the TLS configuration, and returns the exports until now.
    pub(crate) fn replace(
        &self,
        exports: ExportSet,
        tls: Option<Arc<TlsConfig>>,
    ) -> Arc<ExportSet> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.tls = tls.map(TlsAcceptor::from);
        std::mem::replace(&mut state.exports, Arc::new(exports))
    }

    /// Uses this certificate for new clients.
    pub fn set_tls(&self, tls: Arc<TlsConfig>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).tls = Some(tls.into());
    }

    /// The exports with their connections.
    #[must_use]
    pub fn snapshot(&self) -> Vec<ExportSnapshot> {
        self.current().exports.offered.iter().map(LiveExport::snapshot).collect()
    }
}

impl ExportState {
    pub(crate) fn view<'a>(&'a self, client: &'a Client) -> View<'a> {
        View { set: &self.exports, client }
    }

    pub(crate) fn tls_mode(&self) -> TlsMode {
        if self.tls.is_some() { TlsMode::Forced } else { TlsMode::Off }
    }
}

impl ExportSet {
    /// Volumes of `before` keep their connections and counters, also under another name.
    ///
    /// # Errors
    /// When two exports share a name, or one cannot be offered. Nothing is registered then.
    pub(crate) fn new(
        exports: Vec<Export>,
        before: Option<&Self>,
        registry: &Registry,
    ) -> Result<Self, Error> {
        let hasher = RandomState::new();
        let hashes = exports.iter().enumerate();
        let mut by_hash: Vec<_> =
            hashes.map(|(index, export)| (hasher.hash_one(&export.name), index)).collect();
        by_hash.sort_unstable();
        let fail = |export: &Export, what| {
            Err(Error::new(
                ErrorKind::Invalid,
                "export",
                format!("{}: {what}", printable(&export.name)),
            ))
        };
        for pair in by_hash.windows(2) {
            let [one, other] = [&exports[pair[0].1], &exports[pair[1].1]];
            if one.name == other.name {
                return fail(
                    one,
                    "two volumes have this name; give each its own (--name, or name in the file)",
                );
            }
        }
        for export in &exports {
            if let Err(what) = check(export) {
                return fail(export, what);
            }
        }
        let known: HashMap<_, _> = before
            .iter()
            .flat_map(|set| &set.offered)
            .map(|offered| (Arc::as_ptr(&offered.export.volume).cast::<()>(), &offered.users))
            .collect();
        let kept: Vec<_> = exports
            .iter()
            .map(|export| known.get(&Arc::as_ptr(&export.volume).cast::<()>()).copied().cloned())
            .collect();
        // First, so that a new volume does not continue the counters of a renamed one.
        for (export, users) in exports.iter().zip(&kept) {
            if let Some(users) = users {
                users.stats.rename(&export.name);
            }
        }
        let offered = exports.into_iter().zip(kept).map(|(export, users)| {
            let users = users.unwrap_or_else(|| Users::new(registry.volume(&export.name)));
            // Statistics show it even before its first client.
            users.stats.show_held_bytes(export.volume.held_bytes());
            users.stats.show_link(export.volume.link());
            LiveExport { export, users }
        });
        Ok(Self { offered: offered.collect(), by_hash, hasher })
    }

    pub(crate) fn get(&self, index: usize) -> Option<&LiveExport> {
        self.offered.get(index)
    }

    /// The exports of the same volume as this one.
    pub(crate) fn counterpart(&self, of: &LiveExport) -> Option<&LiveExport> {
        self.offered.iter().find(|offered| Arc::ptr_eq(&offered.users, &of.users))
    }

    /// The connections that `now` does not allow any more: those of volumes that it does not offer,
    /// and those of clients that may not use theirs.
    pub(crate) fn not_allowed(&self, now: &Self) -> Vec<Arc<Connection>> {
        let by_users: HashMap<_, _> =
            now.offered.iter().map(|offered| (Arc::as_ptr(&offered.users), offered)).collect();
        let refused = self.offered.iter().flat_map(|before| {
            let after = by_users.get(&Arc::as_ptr(&before.users));
            let mut all = before.users.connections();
            all.retain(|one| after.is_none_or(|now| !now.export.access.permits(&one.client)));
            all
        });
        refused.collect()
    }

    /// Connections being served.
    pub(crate) fn connections(&self) -> usize {
        self.offered.iter().map(|offered| offered.users.count()).sum()
    }

    fn position(&self, name: &str) -> Option<usize> {
        let hash = self.hasher.hash_one(name);
        let first = self.by_hash.partition_point(|(other, _)| *other < hash);
        let same = self.by_hash[first..].iter().take_while(|(other, _)| *other == hash);
        same.map(|(_, index)| *index).find(|index| self.offered[*index].export.name == name)
    }
}

/// # Errors
/// Says why this cannot be exported.
fn check(export: &Export) -> Result<(), &'static str> {
    if export.name.len() > STRING_LEN_MAX {
        return Err("the name is longer than 4096 bytes, the most that NBD has");
    }
    if export.description.len() > STRING_LEN_MAX {
        return Err("the description is longer than 4096 bytes, the most that NBD has");
    }
    sheave_proto::check_exportable(export.volume.info(), export.volume.size())
}

impl LiveExport {
    /// Whether the bound allows one more connection.
    pub(crate) fn has_room(&self) -> bool {
        self.export.connections_max.is_none_or(|max| self.users.count() < max)
    }

    fn snapshot(&self) -> ExportSnapshot {
        let Export { name, description, volume, connections_max, .. } = &self.export;
        ExportSnapshot {
            name: name.clone(),
            description: description.clone(),
            size: volume.size(),
            read_only: volume.info().read_only,
            connections_max: *connections_max,
            clients: self.users.connections().iter().map(|one| one.snapshot()).collect(),
        }
    }
}

impl View<'_> {
    fn permits(&self, index: usize) -> bool {
        let offered = self.set.get(index);
        offered.is_some_and(|offered| offered.export.access.permits(self.client))
    }
}

impl Exports for View<'_> {
    fn len(&self) -> usize {
        self.set.offered.len()
    }

    fn export(&self, index: usize) -> Option<ExportInfo<'_>> {
        let LiveExport { export, .. } = self.set.get(index).filter(|_| self.permits(index))?;
        Some(ExportInfo {
            name: &export.name,
            description: &export.description,
            size: export.volume.size(),
            info: export.volume.info(),
            tls_only: false,
        })
    }

    fn find(&self, name: &str) -> Option<usize> {
        let found = self.set.position(name).filter(|index| self.permits(*index));
        if found.is_some() || !name.is_empty() {
            return found;
        }
        let mut permitted = (0..self.len()).filter(|index| self.permits(*index));
        let only = permitted.next()?;
        permitted.next().is_none().then_some(only)
    }

    fn admit(&self, index: usize) -> Result<(), &'static str> {
        match self.set.get(index) {
            Some(offered) if !offered.has_room() => {
                Err("the export has no room for another client")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use sheave_local::Null;

    use super::*;
    use crate::access::PeerAddress;

    fn export(name: &str, peer: Option<&str>) -> Export {
        let peers = peer.iter().map(|peer| peer.parse().unwrap()).collect();
        Export {
            name: name.to_owned(),
            description: String::new(),
            volume: Arc::new(Null::new(1 << 20)),
            access: Access { names: Vec::new(), peers },
            connections_max: None,
        }
    }

    fn client(address: &str) -> Client {
        Client { address: PeerAddress::Address(address.parse().unwrap()), names: Vec::new() }
    }

    fn set(exports: &[Export], before: Option<&ExportSet>, registry: &Registry) -> ExportSet {
        ExportSet::new(exports.to_vec(), before, registry).unwrap()
    }

    fn names(registry: &Registry) -> Vec<String> {
        registry.snapshot().into_iter().map(|volume| volume.name).collect()
    }

    #[test]
    fn a_client_finds_what_it_may_use_among_many() {
        let exports: Vec<_> = (0..1000)
            .map(|n| export(&format!("e{n}"), Some(if n == 700 { "10.0.0.7" } else { "::1" })))
            .collect();
        let set = set(&exports, None, &Registry::new());
        let (few, many, none) = (client("10.0.0.7"), client("::1"), client("::2"));
        let find = |client: &Client, name: &str| View { set: &set, client }.find(name);
        assert_eq!(
            (find(&few, "e700"), find(&few, ""), find(&few, "e1")),
            (Some(700), Some(700), None)
        );
        for n in (0..1000).filter(|n| *n != 700) {
            assert_eq!(find(&many, &format!("e{n}")), Some(n));
        }
        assert_eq!(
            (find(&many, "e700"), find(&many, ""), find(&many, "e1000")),
            (None, None, None)
        );
        assert_eq!((find(&none, "e1"), find(&none, "")), (None, None));
        let view = View { set: &set, client: &few };
        assert_eq!((0..view.len()).filter(|index| view.export(*index).is_some()).count(), 1);
    }

    #[test]
    fn volumes_keep_their_counters_under_other_names() {
        let registry = Registry::new();
        let [a, b] = ["a", "b"].map(|name| export(name, None));
        let first = set(&[a.clone(), b.clone()], None, &registry);
        // Swapped, and a new one.
        let swap = |export: &Export, name: &str| Export { name: name.to_owned(), ..export.clone() };
        let second =
            set(&[swap(&a, "b"), swap(&b, "a"), export("c", None)], Some(&first), &registry);
        assert!(Arc::ptr_eq(&first.offered[0].users, &second.offered[0].users));
        assert_eq!(names(&registry), ["b", "a", "c"]);
        // Another volume has a name that was in use: what it counts is its own.
        let third = set(&[swap(&a, "d"), export("b", None)], Some(&second), &registry);
        assert!(!Arc::ptr_eq(&third.offered[1].users, &second.offered[0].users));
        assert_eq!(third.offered[0].users.stats.name(), "d");
        drop((first, second));
        registry.forget_unused();
        assert_eq!(names(&registry), ["d", "b"]);
    }

    #[test]
    fn connections_that_are_not_allowed_any_more_are_found() {
        let registry = Registry::new();
        let [a, b] = ["a", "b"].map(|name| export(name, None));
        let before = set(&[a.clone(), b.clone()], None, &registry);
        let attach = |index: usize, id, address| {
            let users = &before.offered[index].users;
            users.attach(id, None, String::new(), client(address), "")
        };
        let held = [attach(0, 1, "10.0.0.1"), attach(0, 2, "::1"), attach(1, 3, "::1")];
        let refused = |now: &[Export]| {
            let now = set(now, Some(&before), &registry);
            let mut ids: Vec<_> = before.not_allowed(&now).iter().map(|one| one.id).collect();
            ids.sort_unstable();
            ids
        };
        let only = Export { access: export("", Some("10.0.0.0/8")).access, ..a.clone() };
        assert!(refused(&[a.clone(), b.clone(), export("c", None)]).is_empty());
        assert_eq!(refused(&[only, b.clone()]), [2]);
        assert_eq!(refused(&[b]), [1, 2]);
        assert_eq!(refused(&[a, export("b", None)]), [3]);
        assert_eq!(before.connections(), 3);
        drop(held);
        assert_eq!(before.connections(), 0);
    }

    #[test]
    fn names_are_told_apart_and_bounded() {
        let registry = Registry::new();
        let twice = [export("a", None), export("b", None), export("a", None)];
        let error = |exports: &[Export]| {
            ExportSet::new(exports.to_vec(), None, &registry).err().unwrap().to_string()
        };
        assert!(error(&twice).contains("a: two volumes have this name"));
        assert!(error(&[export(&"n".repeat(4097), None)]).contains("longer than 4096 bytes"));
        assert!(names(&registry).is_empty(), "nothing is registered");
    }
}
