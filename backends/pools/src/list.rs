//! A pool that is a list: volumes that the configuration names one by one, wherever they are.
//!
//! They were there before, and nothing keeps records of them. The id of a volume is made from its
//! name, so it stays the same.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_volumes::VolumeSpec;
use uuid::Uuid;

use crate::pool::{Found, Key, NewVolume, PoolInfo};
use crate::unrecorded::{self, Unrecorded};

/// What ids are made with.
const LISTED: Uuid = Uuid::from_u128(0x91d6_2c0e_5b7a_4e0b_9a55_06f3_c2d8_1b4e);
/// How long a server may take to say the size of an export.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Volumes that the configuration lists.
pub struct ListPool {
    info: PoolInfo,
    volumes: BTreeMap<Uuid, Entry>,
}

struct Entry {
    name: String,
    text: String,
    spec: VolumeSpec,
    /// To learn its size would start a program.
    starts_program: bool,
}

impl ListPool {
    /// The volumes with these names and VOLUME texts, which the operator of this node has written.
    /// With `trusts_attacher` they may be written for an orchestrator.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with what is wrong with one of them.
    pub fn new(
        pool: &str,
        texts: &BTreeMap<String, String>,
        trusts_attacher: bool,
    ) -> Result<Self> {
        let mut volumes: BTreeMap<Uuid, Entry> = BTreeMap::new();
        for (name, text) in texts {
            let invalid = |why: &str| {
                let why = format!("{pool}: volume {}: {why}", printable(name));
                Error::new(ErrorKind::Invalid, "pool", why)
            };
            let wanted = NewVolume { name: name.clone(), ..NewVolume::default() };
            wanted.check().map_err(|error| invalid(&error.to_string()))?;
            let parsed = VolumeSpec::of_operator(text);
            let spec = parsed.map_err(|error| invalid(&error.to_string()))?;
            if spec.file_path().is_some_and(Path::is_relative) {
                let why = format!("{}: write the whole path, from / on", printable(text));
                return Err(invalid(&why));
            }
            let is_same = |other: &&Entry| other.text == *text || other.spec.is_same_place(&spec);
            if let Some(other) = volumes.values().find(is_same) {
                return Err(invalid(&format!("it is the same as {}", printable(&other.name))));
            }
            let uuid = Uuid::new_v5(&LISTED, name.as_bytes());
            let starts_program = text.parse::<VolumeSpec>().is_err();
            let (name, text) = (name.clone(), text.clone());
            volumes.insert(uuid, Entry { name, text, spec, starts_program });
        }
        Ok(Self { info: unrecorded::info(pool, trusts_attacher), volumes })
    }

    fn not_found(&self, what: &str) -> Error {
        let pool = &self.info.name;
        let why = format!(
            "the configuration lists no volume {} in pool {pool}; see: sheave volume ls",
            printable(what)
        );
        Error::new(ErrorKind::NotFound, "find", why)
    }
}

impl Unrecorded for ListPool {
    fn info(&self) -> &PoolInfo {
        &self.info
    }

    fn elsewhere(&self) -> String {
        format!(
            "the configuration lists the volumes of pool {}: they are made, changed and deleted \
             where they are",
            self.info.name
        )
    }

    fn find(&self, key: Key<'_>) -> Result<Found> {
        let uuid = match key {
            Key::Uuid(uuid) => uuid,
            Key::Name(name) => Uuid::new_v5(&LISTED, name.as_bytes()),
        };
        match (self.volumes.get(&uuid), key) {
            (Some(entry), _) => Ok(entry.found(uuid)),
            (None, Key::Name(name)) => Err(self.not_found(name)),
            (None, Key::Uuid(uuid)) => Err(self.not_found(&uuid.to_string())),
        }
    }

    fn page(&self, behind: Option<Uuid>, max: usize) -> Result<Vec<Found>> {
        let page = self.volumes.iter().filter(|(uuid, _)| behind.is_none_or(|of| **uuid > of));
        Ok(page.take(max).map(|(uuid, entry)| entry.found(*uuid)).collect())
    }

    fn text_of(&self, uuid: Uuid) -> String {
        self.volumes.get(&uuid).map_or_else(|| uuid.to_string(), |entry| entry.text.clone())
    }

    fn uuid_of(&self, text: &str) -> Option<Uuid> {
        self.volumes.iter().find(|(_, entry)| entry.text == text).map(|(uuid, _)| *uuid)
    }
}

impl Entry {
    fn found(&self, uuid: Uuid) -> Found {
        let record = unrecorded::record(uuid, &self.name);
        match self.size() {
            Ok(size) => Found { record, size, trouble: None },
            Err(error) => unrecorded::without_size(record, &error),
        }
    }

    /// Its size without having it open, in bytes; 0 where only opening it would show that.
    fn size(&self) -> Result<u64> {
        if let Some(path) = self.spec.file_path() {
            // Opening a pipe would wait for its writer.
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
            let size = opened.and_then(|mut file| file.seek(SeekFrom::End(0)));
            return size
                .map_err(|error| Error::from_io("open", printable(path).to_string(), error));
        }
        if self.starts_program {
            return Ok(0);
        }
        if let Some(size) = self.spec.stated_size() {
            return Ok(size);
        }
        if let Some(volume) = self.spec.object_volume()? {
            return volume.size();
        }
        match self.spec.nbd_server()? {
            Some(server) => server.export_size(&server.uri.export, ANSWER_MAX),
            None => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pool as _;

    fn pool(volumes: &[(&str, &str)], trusts_attacher: bool) -> Result<ListPool> {
        let volumes = volumes.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        ListPool::new("own", &volumes.collect(), trusts_attacher)
    }

    #[test]
    fn a_listed_volume_has_its_text_and_an_id_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.img");
        let image = image.to_str().unwrap();
        let exec = "nbd+exec:?command=true";
        let of_volume = |name: &str| dir.path().join(name).display().to_string();
        let (store, journals) = (of_volume("objects"), of_volume("journals"));
        let objects = format!("dir://{store}?cache-dir={journals}");
        let memory = "memory:?size=5M";
        let listed = [("db", image), ("old", exec), ("ram", memory), ("objects", &*objects)];
        let pool = pool(&listed, false).unwrap();
        let missing = pool.get(Key::Name("db")).unwrap();
        assert!(missing.trouble.unwrap().contains("a.img"), "it is known, and is not there");
        std::fs::write(image, [0; 8192]).unwrap();
        let found = pool.get(Key::Name("db")).unwrap();
        assert_eq!((found.size, found.trouble, found.record.never_format), (8192, None, true));
        let uuid = found.record.uuid;
        assert_eq!(uuid.to_string(), "be57ebd0-2c3c-58b5-b8bd-cd2bd432c4de");
        assert_eq!((pool.text(uuid).as_str(), pool.uuid_of_text(image)), (image, Some(uuid)));
        assert_eq!(pool.get(Key::Uuid(uuid)).unwrap().record.name, "db");
        let old = pool.get(Key::Name("old")).unwrap();
        assert_eq!((old.size, old.trouble), (0, None), "no program is started for its size");
        assert_eq!(pool.get(Key::Name("ram")).unwrap().size, 5 << 20);
        let made = objects.parse::<VolumeSpec>().unwrap().object_volume().unwrap().unwrap();
        let missing = pool.get(Key::Name("objects")).unwrap();
        assert!(missing.trouble.unwrap().contains("there is no volume"));
        made.create(6 << 20, sheave_volumes::Codec::Plain, sheave_volumes::Durability::Local)
            .unwrap();
        let found = pool.get(Key::Name("objects")).unwrap();
        assert_eq!((found.size, found.trouble), (6 << 20, None));
        assert_eq!(pool.list(None, 9).unwrap().len(), 4);
        assert_eq!(pool.list(pool.volumes.keys().next().copied(), 9).unwrap().len(), 3);
        assert_eq!(pool.get(Key::Name("c")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(pool.delete(uuid).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_list_names_each_volume_once_by_a_whole_path() {
        for (volumes, why) in [
            (&[("a", "images/a.img")][..], "from / on"),
            (&[("a", "/dev/null"), ("b", "file:///dev/../dev/null")], "the same as a"),
            (&[("a", "nbd://s/x"), ("b", "nbd://s/x")], "the same as a"),
            (&[("a", "s4://x/y")], "unknown scheme"),
            (&[("", "/dev/null")], "1 to 128"),
        ] {
            let error = pool(volumes, false).err().expect(why);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
