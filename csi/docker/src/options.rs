//! The options of `docker volume create -o`.

use std::collections::BTreeMap;
use std::time::Duration;

use sheave_core::{parse_digits, parse_size};
use sheave_node::{Access, Error, Front, Fs, Kind, Result, parse_force_unstage_after};

const POOL: &str = "pool";
const VOLUME: &str = "volume";
const SIZE: &str = "size";
const FS_TYPE: &str = "fstype";
const MKFS: &str = "mkfs";
const READ_ONLY: &str = "readonly";
const LIMIT_BPS: &str = "limit-bps";
const LIMIT_IOPS: &str = "limit-iops";
const FRONT: &str = "front";
const MOUNT_OPTIONS: &str = "mount-options";
const FORCE_UNSTAGE_AFTER: &str = "force-unstage-after";
/// All options, with a value of each.
pub(crate) const KNOWN: [(&str, &str); 11] = [
    (POOL, "a pool of the daemon's configuration"),
    (VOLUME, "POOL/NAME of a volume that exists"),
    (SIZE, "bytes, such as 10G"),
    (FS_TYPE, "ext4, xfs or btrfs"),
    (MKFS, "true, or false to format nothing"),
    (READ_ONLY, "true or false"),
    (LIMIT_BPS, "bytes per second, such as 100M"),
    (LIMIT_IOPS, "requests per second, such as 5000"),
    (FRONT, Front::FORM),
    (MOUNT_OPTIONS, "as for mount(8), such as noatime,discard"),
    (FORCE_UNSTAGE_AFTER, sheave_node::FORCE_UNSTAGE_AFTER_FORM),
];

/// As they were given.
pub(crate) type Given = BTreeMap<String, String>;

/// What they mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) pool: Option<String>,
    pub(crate) volume: Option<String>,
    /// Bytes.
    pub(crate) size: Option<u64>,
    pub(crate) fs: Fs,
    pub(crate) may_format: bool,
    pub(crate) read_only: bool,
    /// Bytes per second; 0 is no limit.
    pub(crate) limit_bps: u64,
    /// Requests per second; 0 is no limit.
    pub(crate) limit_iops: u64,
    pub(crate) front: Front,
    pub(crate) mount_options: Vec<String>,
    pub(crate) force_unstage_after: Option<Duration>,
}

impl Options {
    /// # Errors
    /// [`Kind::Invalid`] with the option's name and what it can be.
    pub(crate) fn parse(given: &Given) -> Result<Self> {
        let mut options = Self {
            pool: None,
            volume: None,
            size: None,
            fs: Fs::Ext4,
            may_format: true,
            read_only: false,
            limit_bps: 0,
            limit_iops: 0,
            front: Front::Auto,
            mount_options: Vec::new(),
            force_unstage_after: None,
        };
        for (key, value) in given {
            if options.take(key, value).is_none() {
                return Err(Error::new(Kind::Invalid, wrong(key)));
            }
        }
        if options.volume.is_some() && (options.pool.is_some() || options.size.is_some()) {
            let why = "option volume names a volume that exists, so pool and size have no meaning";
            return Err(Error::new(Kind::Invalid, why));
        }
        Ok(options)
    }

    /// How the volume is used.
    pub(crate) fn access(&self) -> Access {
        Access::Mount { fs: self.fs, options: self.mount_options.clone() }
    }

    fn take(&mut self, key: &str, value: &str) -> Option<()> {
        let text = || Some(value.to_owned()).filter(|value| !value.is_empty());
        match key {
            POOL => self.pool = Some(text().filter(|pool| !pool.contains('/'))?),
            VOLUME => self.volume = Some(text().filter(|volume| volume.contains('/'))?),
            SIZE => self.size = Some(parse_size(value).ok().filter(|size| *size > 0)?),
            FS_TYPE => self.fs = Fs::of_name(value)?,
            MKFS => self.may_format = truth(value)?,
            READ_ONLY => self.read_only = truth(value)?,
            LIMIT_BPS => self.limit_bps = parse_size(value).ok()?,
            LIMIT_IOPS => self.limit_iops = parse_digits(&text()?)?,
            FRONT => self.front = Front::of_name(value)?,
            MOUNT_OPTIONS => self.mount_options = text().into_iter().collect(),
            FORCE_UNSTAGE_AFTER => {
                self.force_unstage_after = Some(parse_force_unstage_after(value)?);
            }
            _ => return None,
        }
        Some(())
    }
}

fn truth(value: &str) -> Option<bool> {
    match value {
        "true" | "" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

fn wrong(key: &str) -> String {
    match KNOWN.iter().find(|(name, _)| *name == key) {
        Some((name, form)) => format!("option {name}: write {form}"),
        None => {
            let key: String = key.chars().take(64).collect();
            let known = KNOWN.map(|(name, _)| name).join(", ");
            format!("no option is called {key:?}; known: {known}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(given: &[(&str, &str)]) -> Result<Options> {
        let given = given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Options::parse(&given.collect())
    }

    #[test]
    fn options_are_read() {
        let options = parse(&[
            ("pool", "fast"),
            ("size", "10G"),
            ("fstype", "xfs"),
            ("mkfs", "false"),
            ("limit-iops", "500"),
            ("limit-bps", "100M"),
            ("front", "nbd"),
            ("mount-options", "noatime"),
            ("readonly", ""),
            ("force-unstage-after", "10"),
        ])
        .expect("good");
        assert_eq!((options.pool.as_deref(), options.size), (Some("fast"), Some(10 << 30)));
        assert_eq!((options.fs, options.may_format, options.read_only), (Fs::Xfs, false, true));
        assert_eq!((options.limit_iops, options.limit_bps), (500, 100 << 20));
        assert_eq!(options.front, Front::Nbd);
        assert!(parse(&[]).expect("good").may_format);
        assert!(parse(&[("volume", "fast/db")]).is_ok());
    }

    #[test]
    fn a_wrong_option_is_named_with_what_it_can_be() {
        for (key, value, why) in [
            ("size", "0", "option size: write bytes"),
            ("size", "much", "option size: write bytes"),
            ("fstype", "ntfs", "option fstype: write ext4"),
            ("front", "scsi", "option front: write auto, ublk or nbd"),
            ("mkfs", "no", "option mkfs: write true"),
            ("pool", "a/b", "option pool"),
            ("volume", "db", "option volume: write POOL/NAME"),
            ("limit-iops", "", "option limit-iops"),
            ("force-unstage-after", "9", "from 10 to 86400"),
            ("fsType", "xfs", "known: pool, volume, size"),
        ] {
            let error = parse(&[(key, value)]).expect_err("refused").to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(parse(&[("volume", "fast/db"), ("size", "1G")]).is_err());
    }
}
