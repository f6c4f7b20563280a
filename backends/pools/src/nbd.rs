//! A pool that is an NBD server: its exports are volumes, which are made, deleted and made longer
//! there.
//!
//! A server keeps nothing for us, so such volumes have no records. The id of a volume is made from
//! the name of its export, so it stays the same.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind, Result, percent_decode, percent_encode, printable};
use sheave_volumes::{NbdServer, VolumeSpec};
use uuid::Uuid;

use crate::pool::{Found, Key, PoolInfo};
use crate::record::Record;
use crate::unrecorded::{self, Unrecorded};

/// What ids are made with.
const EXPORTS: Uuid = Uuid::from_u128(0x4c1f_83d6_02be_4f57_a6a9_7d10_3be8_52c7);
/// How long the server may take for one answer, and for all of a list.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The exports of an NBD server.
pub struct NbdPool {
    info: PoolInfo,
    /// The URL without an export, up to its parameters, and these.
    location: String,
    query: String,
    server: NbdServer,
    /// The names of exports that were seen, by their ids.
    names: Mutex<BTreeMap<Uuid, String>>,
}

impl NbdPool {
    /// The server of this URL, which names no export. With `trusts_attacher` its exports may be
    /// written for an orchestrator.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with what is wrong with the URL.
    pub fn new(name: &str, url: &str, trusts_attacher: bool) -> Result<Self> {
        let invalid = |why| Error::new(ErrorKind::Invalid, "pool", format!("{name}: {why}"));
        let server = url.parse::<VolumeSpec>()?.nbd_server()?;
        let server = server.filter(|server| server.uri.export.is_empty()).ok_or_else(|| {
            invalid(format!("{}: a pool is a server, without an export", printable(url)))
        })?;
        let (location, query) = url.split_at(url.find('?').unwrap_or(url.len()));
        let location = location.trim_end_matches('/');
        // `nbd+unix:` has no host.
        let slashes = if location.ends_with(':') { "///" } else { "/" };
        Ok(Self {
            info: unrecorded::info(name, trusts_attacher),
            location: format!("{location}{slashes}"),
            query: query.to_owned(),
            server,
            names: Mutex::default(),
        })
    }

    fn names(&self) -> MutexGuard<'_, BTreeMap<Uuid, String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the name of an export for its id.
    fn seen(&self, name: &str) -> Uuid {
        let uuid = Uuid::new_v5(&EXPORTS, name.as_bytes());
        self.names().entry(uuid).or_insert_with(|| name.to_owned());
        uuid
    }

    fn found(&self, name: &str, within: Duration) -> Result<Found> {
        let size = self.server.export_size(name, within)?;
        Ok(Found { record: self.record(name), size, trouble: None })
    }

    fn record(&self, name: &str) -> Record {
        unrecorded::record(self.seen(name), name)
    }

    /// The exports that have names.
    fn exports(&self) -> Result<Vec<String>> {
        let mut names = self.server.exports(ANSWER_MAX)?;
        names.retain(|name| !name.is_empty());
        Ok(names)
    }

    fn not_found(&self, what: &str) -> Error {
        let pool = &self.info.name;
        let why = format!(
            "the server of pool {pool} names no export {}; see: sheave volume ls",
            printable(what)
        );
        Error::new(ErrorKind::NotFound, "find", why)
    }
}

impl Unrecorded for NbdPool {
    fn info(&self) -> &PoolInfo {
        &self.info
    }

    fn elsewhere(&self) -> String {
        format!(
            "pool {} is an NBD server: its exports are made, changed and deleted there",
            self.info.name
        )
    }

    fn find(&self, key: Key<'_>) -> Result<Found> {
        let name = match key {
            Key::Name(name) if !name.is_empty() => name.to_owned(),
            Key::Name(name) => return Err(self.not_found(name)),
            Key::Uuid(uuid) => {
                let known = self.names().get(&uuid).cloned();
                let found =
                    |names: Vec<String>| names.into_iter().find(|name| self.seen(name) == uuid);
                let name =
                    known.map_or_else(|| self.exports().map(found), |name| Ok(Some(name)))?;
                name.ok_or_else(|| self.not_found(&uuid.to_string()))?
            }
        };
        self.found(&name, ANSWER_MAX)
    }

    fn page(&self, behind: Option<Uuid>, max: usize) -> Result<Vec<Found>> {
        let begun = Instant::now();
        let names = self.exports()?.into_iter().map(|name| (self.seen(&name), name));
        let names: BTreeMap<_, _> = names.collect();
        let page = names.iter().filter(|(uuid, _)| behind.is_none_or(|behind| **uuid > behind));
        let found = |name: &String| {
            let left = ANSWER_MAX.saturating_sub(begun.elapsed());
            let found = self.found(name, left);
            found.unwrap_or_else(|error| unrecorded::without_size(self.record(name), &error))
        };
        Ok(page.take(max).map(|(_, name)| found(name)).collect())
    }

    fn text_of(&self, uuid: Uuid) -> String {
        let name = self.names().get(&uuid).cloned().unwrap_or_else(|| uuid.to_string());
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~');
        let name = percent_encode(name.as_bytes(), is_plain);
        format!("{}{name}{}", self.location, self.query)
    }

    fn uuid_of(&self, text: &str) -> Option<Uuid> {
        let name = text.strip_prefix(&self.location)?.strip_suffix(&self.query)?;
        let name = percent_decode(name)?;
        let uuid = self.seen(std::str::from_utf8(&name).ok()?);
        (self.text_of(uuid) == text).then_some(uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{NewVolume, Pool as _, SizeRange};

    fn pool(url: &str) -> NbdPool {
        NbdPool::new("remote", url, false).unwrap()
    }

    #[test]
    fn a_volume_is_known_by_its_text_and_its_id_stays() {
        for (url, text) in [
            ("nbd://server", "nbd://server/disk%201"),
            ("nbd://server:10810/", "nbd://server:10810/disk%201"),
            ("nbds://s?tls-certificates=/c", "nbds://s/disk%201?tls-certificates=/c"),
            ("nbd:", "nbd:///disk%201"),
            ("nbd+unix:?socket=/s", "nbd+unix:///disk%201?socket=/s"),
            ("nbd+unix:///?socket=/s", "nbd+unix:///disk%201?socket=/s"),
        ] {
            let pool = pool(url);
            let uuid = pool.uuid_of_text(text).expect(text);
            assert_eq!(pool.text(uuid), text);
            assert_eq!(uuid.to_string(), "f0b942f7-2805-5693-a016-fac96d3daf17", "of any server");
            let spec: VolumeSpec = text.parse().unwrap();
            assert_eq!(spec.nbd_server().unwrap().unwrap().uri.export, "disk 1");
            for other in ["nbd://other/disk%201", "nbd://server/disk 1", "/disk%201"] {
                assert_eq!(pool.uuid_of_text(other), None, "{url} {other}");
            }
        }
    }

    #[test]
    fn a_url_names_a_server_and_no_export() {
        for url in ["nbd://server/disk", "file:///images", "memory:?size=1G"] {
            assert_eq!(NbdPool::new("a", url, false).err().unwrap().kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn volumes_of_a_server_are_made_and_changed_there() {
        let pool = pool("nbd://server");
        let new = NewVolume {
            name: "a".to_owned(),
            size: SizeRange::default(),
            limit_bps: 0,
            limit_iops: 0,
            parameters: BTreeMap::new(),
        };
        let refused = [
            pool.create(&new).err(),
            pool.delete(Uuid::nil()).err(),
            pool.update(Uuid::nil(), &mut |_| Ok(())).err(),
        ];
        for error in refused.map(|error| error.expect("refused")) {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("NBD server"), "{error}");
        }
    }

    #[test]
    fn rule_12_a_server_that_is_away_leaves_the_outcome_open() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("none");
        let pool = pool(&format!("nbd+unix:?socket={}", socket.display()));
        let away = [
            pool.list(None, 9).err(),
            pool.get(Key::Name("a")).err(),
            pool.get(Key::Uuid(Uuid::nil())).err(),
            pool.resize(Uuid::nil(), SizeRange::default()).err(),
        ];
        for error in away.map(|error| error.expect("it is away")) {
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        }
    }
}
