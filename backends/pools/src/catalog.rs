//! All pools of a configuration, and the ids of volumes among them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_volumes::VolumeSpec;
use uuid::Uuid;

use crate::file::{FilePool, Limits};
use crate::list::ListPool;
use crate::nbd::NbdPool;
use crate::pool::{Found, Key, Pool};
use crate::sharing::{Judge, judge};

/// The size of volumes where neither a call nor the configuration says one, in bytes.
const DEFAULT_SIZE: u64 = 1 << 30;
/// Bytes of a pool's name. With a UUID it is an id of less than 128 bytes, as CSI wants it.
const NAME_LEN_MAX: usize = 63;

/// What the configuration says of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Lower case letters, digits and `-`.
    pub name: String,
    /// Where its volumes are; empty where they are listed.
    pub url: String,
    /// The VOLUME texts of a pool that is a list, by name. The operator has written them, so they
    /// may start programs.
    pub volumes: BTreeMap<String, String>,
    /// Several nodes use it, one at a time for each volume. Of a directory.
    pub shared: bool,
    /// The orchestrator alone keeps two nodes from writing to a volume at once. Of an NBD server,
    /// and of a list.
    pub trust_attacher: bool,
    /// The most bytes that all volumes may have together.
    pub capacity: Option<u64>,
    /// The most bytes of one volume.
    pub max_size: Option<u64>,
    /// Bytes of a volume that no size is wanted for; by default 1 GiB, or `max_size` if it is less.
    pub default_size: Option<u64>,
}

/// The process that uses pools.
#[derive(Clone, Debug)]
pub struct Site {
    /// The state directory of a daemon. What its pools are is remembered there: one whose storage
    /// is not mounted is an error then, and not empty.
    pub state: Option<PathBuf>,
    /// Judges the file systems of pools that nodes share.
    pub judge: Judge,
}

impl Default for Site {
    fn default() -> Self {
        Self { state: None, judge }
    }
}

/// A volume among all pools: POOL/UUID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeId {
    /// The pool's name.
    pub pool: String,
    /// The volume in it.
    pub uuid: Uuid,
}

/// A volume that was found, and where.
#[derive(Clone)]
pub struct Listed {
    /// Its pool.
    pub pool: Arc<dyn Pool>,
    /// The volume.
    pub found: Found,
}

/// All pools of a configuration.
#[derive(Clone, Default)]
pub struct Pools {
    pools: BTreeMap<String, Arc<dyn Pool>>,
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.uuid)
    }
}

impl FromStr for VolumeId {
    type Err = Error;

    /// # Errors
    /// [`ErrorKind::NotFound`]: what is written otherwise is the id of no volume.
    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(pool, uuid)| {
            Some(Self { pool: pool.to_owned(), uuid: uuid.parse().ok()? })
        });
        // There is one way to write an id.
        parsed.filter(|id| id.to_string() == text).ok_or_else(|| {
            let why = format!("there is no volume {}; an id is POOL/UUID", printable(text));
            Error::new(ErrorKind::NotFound, "find", why)
        })
    }
}

impl Listed {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        VolumeId { pool: self.pool.info().name.clone(), uuid: self.found.record.uuid }
    }
}

impl Pools {
    /// The pools of a configuration; their storage is not looked at yet.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with what is wrong.
    pub fn new(configs: &[PoolConfig], site: &Site) -> Result<Self> {
        let mut pools = BTreeMap::new();
        for (index, config) in configs.iter().enumerate() {
            if let Some(other) = configs[..index].iter().find(|other| is_same(other, config)) {
                let (name, other) = (&config.name, &other.name);
                let why = format!("{name}: it is the same as pool {other}, {}", config.url);
                return Err(Error::new(ErrorKind::Invalid, "pool", why));
            }
            pools.insert(config.name.clone(), open(config, site)?);
        }
        let pools = Self { pools };
        for config in configs {
            pools.check_list(config)?;
        }
        Ok(pools)
    }

    /// Checks that no other pool has a volume that a list has: it would be two.
    fn check_list(&self, config: &PoolConfig) -> Result<()> {
        let others = || self.pools.iter().filter(|(name, _)| **name != config.name);
        for (name, text) in &config.volumes {
            let is_in = |pool: &Arc<dyn Pool>| pool.uuid_of_text(text).is_some();
            if let Some((other, _)) = others().find(|(_, pool)| is_in(pool)) {
                let (pool, name) = (&config.name, printable(name));
                let why = format!("{pool}: volume {name}: it is a volume of pool {other}");
                return Err(Error::new(ErrorKind::Invalid, "pool", why));
            }
        }
        Ok(())
    }

    /// All pools, by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<dyn Pool>> {
        self.pools.values()
    }

    /// The pool of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with the names that there are.
    pub fn pool(&self, name: &str) -> Result<&Arc<dyn Pool>> {
        self.pools.get(name).ok_or_else(|| {
            let known = self.names();
            let why = format!("there is no pool {}; there are: {known}", printable(name));
            Error::new(ErrorKind::NotFound, "find", why)
        })
    }

    /// For messages.
    fn names(&self) -> String {
        let known: Vec<_> = self.pools.keys().map(String::as_str).collect();
        if known.is_empty() { "none".to_owned() } else { known.join(", ") }
    }

    /// The volume that is called POOL/UUID or POOL/NAME; an id comes before a name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none, and what the pool's storage says.
    pub fn by_name(&self, text: &str) -> Result<Listed> {
        let (pool, name) = self.split(text)?;
        if let Ok(id) = text.parse::<VolumeId>() {
            match self.by_id(&id) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => return other,
            }
        }
        let pool = Arc::clone(self.pool(pool)?);
        let found = pool.get(Key::Name(name))?;
        Ok(Listed { pool, found })
    }

    /// The pool and the name, or the UUID, of what is called POOL/NAME.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a path, a URL or another text.
    pub fn split<'a>(&self, text: &'a str) -> Result<(&'a str, &'a str)> {
        let named = text.split_once('/');
        let named = named.filter(|(pool, _)| !pool.is_empty() && !pool.contains(['.', ':']));
        named.ok_or_else(|| {
            let why = format!("{} is no volume of a pool: write POOL/NAME", printable(text));
            let known = self.names();
            Error::new(ErrorKind::NotFound, "find", format!("{why}; the pools are: {known}"))
        })
    }

    /// The volume with this id.
    ///
    /// # Errors
    /// As for [`Self::by_name`].
    pub fn by_id(&self, id: &VolumeId) -> Result<Listed> {
        let pool = Arc::clone(self.pool(&id.pool)?);
        let found = pool.get(Key::Uuid(id.uuid))?;
        Ok(Listed { pool, found })
    }

    /// Whether this is the name or id of a volume of a pool that there is, and no URL and no path.
    #[must_use]
    pub fn has_pool_of(&self, text: &str) -> bool {
        text.split_once('/').is_some_and(|(pool, _)| self.pools.contains_key(pool))
    }

    /// Checks that this daemon may write to the volume with this text, which it has open.
    ///
    /// # Errors
    /// As for [`Pool::check_writer`].
    pub fn check_writer(&self, text: &str) -> Result<()> {
        match self.id_of_text(text) {
            Some(id) => self.pool(&id.pool)?.check_writer(id.uuid),
            None => Ok(()),
        }
    }

    /// The volume with this VOLUME text.
    #[must_use]
    pub fn id_of_text(&self, text: &str) -> Option<VolumeId> {
        self.pools.iter().find_map(|(name, pool)| {
            Some(VolumeId { pool: name.clone(), uuid: pool.uuid_of_text(text)? })
        })
    }

    /// At most `max` volumes of a pool, behind this id, in the order of their ids.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such pool, and what its storage says.
    pub fn list(&self, pool: &str, behind: Option<&VolumeId>, max: usize) -> Result<Vec<Listed>> {
        let of = self.pool(pool)?;
        if behind.is_some_and(|id| *pool < *id.pool) {
            return Ok(Vec::new());
        }
        let behind = behind.filter(|id| *id.pool == *pool).map(|id| id.uuid);
        let found = of.list(behind, max)?.into_iter();
        Ok(found.map(|found| Listed { pool: Arc::clone(of), found }).collect())
    }
}

/// Whether both have the same volumes: each would be two.
fn is_same(one: &PoolConfig, other: &PoolConfig) -> bool {
    let spec = |config: &PoolConfig| config.url.parse::<VolumeSpec>().ok();
    let file = |spec: &VolumeSpec| spec.file_path().and_then(|path| path.canonicalize().ok());
    match (spec(one), spec(other)) {
        (Some(one), Some(other)) => {
            one.is_same_place(&other) || file(&one).is_some_and(|path| Some(path) == file(&other))
        }
        _ => false,
    }
}

fn open(config: &PoolConfig, site: &Site) -> Result<Arc<dyn Pool>> {
    let PoolConfig { name, url, volumes, shared, trust_attacher, .. } = config;
    let PoolConfig { capacity, max_size, default_size, .. } = config;
    let invalid = |why: String| Error::new(ErrorKind::Invalid, "pool", format!("{name}: {why}"));
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > NAME_LEN_MAX || !name.chars().all(is_plain) {
        let why = format!(
            "\"{}\": a pool's name is of a to z, 0 to 9 and -, {NAME_LEN_MAX} at most",
            printable(name)
        );
        return Err(Error::new(ErrorKind::Invalid, "pool", why));
    }
    let makes_volumes = volumes.is_empty() && !url.starts_with("nbd");
    if !makes_volumes
        && (*shared || capacity.is_some() || max_size.is_some() || default_size.is_some())
    {
        let what = if volumes.is_empty() { "an NBD server" } else { "a list" };
        let why = "has its volumes already: shared, capacity, max_size and default_size are of \
                   directories";
        return Err(invalid(format!("{what} {why}")));
    }
    if !volumes.is_empty() {
        if !url.is_empty() {
            return Err(invalid("it has both url and volumes; write one of them".to_owned()));
        }
        return Ok(Arc::new(ListPool::new(name, volumes, *trust_attacher)?));
    }
    if url.starts_with("nbd") {
        return Ok(Arc::new(NbdPool::new(name, url, *trust_attacher)?));
    }
    if !url.starts_with("file:") {
        let why = "a pool is file:///DIRECTORY, or a server such as nbd://HOST";
        return Err(invalid(format!("{}: {why}", printable(url))));
    }
    if *trust_attacher {
        let why = "a directory has records: trust_attacher is of NBD servers and lists";
        return Err(invalid(why.to_owned()));
    }
    let spec: VolumeSpec = url.parse()?;
    if spec.has_parameters() {
        return Err(invalid(format!("{}: a pool's URL has no parameters", printable(url))));
    }
    let dir = spec.file_path().map_or_else(PathBuf::new, |path| path.to_owned());
    let most = max_size.unwrap_or(DEFAULT_SIZE);
    let default_size = default_size.unwrap_or(DEFAULT_SIZE.min(most));
    if max_size.is_some_and(|most| default_size > most) {
        return Err(invalid("default_size is more than max_size".to_owned()));
    }
    let limits = Limits { capacity: *capacity, max_size: *max_size, default_size };
    let judge = shared.then_some(site.judge);
    Ok(FilePool::new(name, dir, limits, site.state.clone(), judge))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::pool::{NewVolume, SizeRange};

    use super::*;

    fn config(name: &str, dir: &Path) -> PoolConfig {
        let url = format!("file://{}", dir.to_str().unwrap());
        PoolConfig {
            name: name.to_owned(),
            url,
            volumes: BTreeMap::new(),
            shared: false,
            trust_attacher: false,
            capacity: None,
            max_size: None,
            default_size: Some(1 << 20),
        }
    }

    fn make(pools: &Pools, pool: &str, name: &str) -> VolumeId {
        let new = NewVolume {
            name: name.to_owned(),
            size: SizeRange::default(),
            limit_bps: 0,
            limit_iops: 0,
            parameters: BTreeMap::new(),
        };
        let pool = Arc::clone(pools.pool(pool).unwrap());
        let found = pool.create(&new).unwrap();
        Listed { pool, found }.id()
    }

    #[test]
    fn a_volume_of_a_list_is_in_no_other_pool() {
        let list = |name: &str, text: &str| {
            let volumes = [("db".to_owned(), text.to_owned())].into();
            let of = config(name, Path::new("/"));
            PoolConfig { url: String::new(), volumes, default_size: None, ..of }
        };
        let dir = tempfile::tempdir().unwrap();
        let fast = config("fast", dir.path());
        let pools = Pools::new(std::slice::from_ref(&fast), &Site::default()).unwrap();
        let image = pools.pool("fast").unwrap().text(make(&pools, "fast", "a").uuid);
        for (one, other) in
            [(fast, list("own", &image)), (list("own", "nbd://s/db"), list("more", "nbd://s/db"))]
        {
            let refused = Pools::new(&[one, other], &Site::default()).err().expect("refused");
            assert!(refused.to_string().contains("it is a volume of pool"), "{refused}");
        }
    }

    #[test]
    fn a_configuration_that_makes_no_sense_is_refused() {
        for (name, url) in [
            ("Fast", "file:///images"),
            ("", "file:///images"),
            ("a/b", "file:///images"),
            ("fast", "/images"),
            ("fast", "file://images"),
            ("fast", "file:///images?direct=true"),
            ("fast", "memory:?size=1G"),
        ] {
            let config = PoolConfig { url: url.to_owned(), ..config(name, Path::new("/")) };
            let refused = Pools::new(&[config], &Site::default()).err().unwrap();
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{name} {url}");
        }
    }

    #[test]
    fn a_pool_has_one_name() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("same")).unwrap();
        let twice = [config("a", dir.path()), config("b", &dir.path().join("same"))];
        let refused = Pools::new(&twice, &Site::default()).err().unwrap();
        assert!(refused.kind() == ErrorKind::Invalid && refused.to_string().contains("pool a"));
        let server =
            |name: &str| PoolConfig { url: "nbd://s".to_owned(), ..config(name, dir.path()) };
        let server = |name: &str| PoolConfig { default_size: None, ..server(name) };
        assert!(Pools::new(&[server("a"), server("b")], &Site::default()).is_err());
    }

    #[test]
    fn rule_05_an_id_is_written_in_one_way() {
        let id = VolumeId { pool: "fast".to_owned(), uuid: Uuid::now_v7() };
        assert_eq!(id.to_string().parse::<VolumeId>().unwrap(), id);
        let upper = format!("fast/{}", id.uuid.to_string().to_uppercase());
        for wrong in ["", "fast", "fast/", "fast/a", "/", &upper, &format!("fast/{{{}}}", id.uuid)]
        {
            assert_eq!(wrong.parse::<VolumeId>().unwrap_err().kind(), ErrorKind::NotFound);
        }
    }

    #[test]
    fn rule_13_pages_are_stable_while_volumes_come_and_go() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let pools = [config("a", dirs[0].path()), config("b", dirs[1].path())];
        let pools = Pools::new(&pools, &Site::default()).unwrap();
        let ids: Vec<_> = [("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")]
            .map(|(pool, name)| make(&pools, pool, name))
            .into();
        let page = |behind: Option<&VolumeId>, max| -> Vec<VolumeId> {
            let of = ["a", "b"].map(|pool| pools.list(pool, behind, max).unwrap());
            of.iter().flatten().map(Listed::id).collect()
        };
        assert_eq!(page(None, usize::MAX), ids);
        assert_eq!(page(None, 1), [ids[0].clone(), ids[2].clone()], "of each pool");
        assert_eq!(page(Some(&ids[0]), 9), ids[1..]);
        // The page's last volume is deleted, and others are made.
        pools.pool("b").unwrap().delete(ids[2].uuid).unwrap();
        let newest = make(&pools, "b", "5");
        assert_eq!(page(Some(&ids[2]), 3), [ids[3].clone(), newest]);
        assert!(pools.list("c", None, 9).is_err());
        assert_eq!(pools.by_name("b/4").unwrap().id(), ids[3]);
        assert_eq!(pools.by_name(&ids[3].to_string()).unwrap().id(), ids[3]);
        let text = pools.pool("b").unwrap().text(ids[3].uuid);
        assert_eq!(pools.id_of_text(&text), Some(ids[3].clone()));
        assert!(pools.has_pool_of("a/x") && !pools.has_pool_of("c/x"));
    }
}
