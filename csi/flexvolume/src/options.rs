//! The options of a volume, as kubelet and controller-manager give them: those of the volume, and
//! under `kubernetes.io/` what Kubernetes adds. They have the pod's secrets, so no message quotes
//! them.

use std::collections::BTreeMap;
use std::time::Duration;

use sheave_node::{Access, Error, Front, Fs, Kind, Result, parse_force_unstage_after};

/// The volume: POOL/NAME or POOL/UUID.
const VOLUME: &str = "volume";
/// Which driver makes the device: `auto`, `ublk` or `nbd`.
const FRONT: &str = "front";
/// As for mount(8), separated by commas.
const MOUNT_OPTIONS: &str = "mount-options";
/// Seconds of unstaging after which hanging storage is given up.
const FORCE_UNSTAGE_AFTER: &str = "force-unstage-after";
const KNOWN: [&str; 4] = [VOLUME, FRONT, MOUNT_OPTIONS, FORCE_UNSTAGE_AFTER];

const OF_KUBERNETES: &str = "kubernetes.io/";
const FS_TYPE: &str = "kubernetes.io/fsType";
const READ_WRITE: &str = "kubernetes.io/readwrite";
/// The name of the PersistentVolume, or that of the volume in its pod.
const CLAIM: &str = "kubernetes.io/pvOrVolumeName";

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) volume: String,
    pub(crate) access: Access,
    pub(crate) read_only: bool,
    pub(crate) front: Front,
    pub(crate) force_unstage_after: Option<Duration>,
    pub(crate) claim: String,
}

impl Options {
    /// # Errors
    /// [`Kind::Invalid`] with the option's name, and what is known.
    pub(crate) fn parse(json: &str) -> Result<Self> {
        let mut all = parse_texts(json)?;
        let Some(volume) = all.remove(VOLUME).filter(|volume| !volume.is_empty()) else {
            return invalid(format!("option {VOLUME} is missing: write POOL/NAME"));
        };
        let fs = match all.remove(FS_TYPE).unwrap_or_default() {
            name if name.is_empty() => Fs::Ext4,
            name => match Fs::of_name(&name) {
                Some(fs) => fs,
                None => {
                    let known = Fs::ALL.map(Fs::name).join(", ");
                    return invalid(format!("fsType is not known here; write one of {known}"));
                }
            },
        };
        let read_only = match all.remove(READ_WRITE).as_deref() {
            Some("ro") => true,
            None | Some("" | "rw") => false,
            Some(_) => return invalid(format!("{READ_WRITE} is neither ro nor rw")),
        };
        let options = all.remove(MOUNT_OPTIONS).into_iter().collect();
        Ok(Self {
            volume,
            access: Access::Mount { fs, options },
            read_only,
            front: all.remove(FRONT).map_or(Ok(Front::Auto), |name| front(&name))?,
            force_unstage_after: all.remove(FORCE_UNSTAGE_AFTER).map(force_after).transpose()?,
            claim: all.remove(CLAIM).unwrap_or_default(),
        })
    }
}

fn invalid<T>(why: String) -> Result<T> {
    Err(Error::new(Kind::Invalid, why))
}

/// Reads an object of options that are known here, or are Kubernetes' own.
fn parse_texts(json: &str) -> Result<BTreeMap<String, String>> {
    let all: BTreeMap<String, String> = match serde_json::from_str(json) {
        Ok(all) => all,
        // The parser's own message may quote a secret.
        Err(error) => {
            return invalid(format!(
                "the options are no JSON object of texts (line {}, column {})",
                error.line(),
                error.column()
            ));
        }
    };
    let is_known = |key: &str| KNOWN.contains(&key) || key.starts_with(OF_KUBERNETES);
    match all.keys().find(|key| !is_known(key)) {
        None => Ok(all),
        Some(key) => {
            let key: String = key.chars().take(64).collect();
            invalid(format!("no option is called {key:?}; known: {}", KNOWN.join(", ")))
        }
    }
}

fn front(name: &str) -> Result<Front> {
    let wrong = || invalid(format!("option {FRONT}: write {}", Front::FORM));
    Front::of_name(name).map_or_else(wrong, Ok)
}

fn force_after(text: String) -> Result<Duration> {
    let form = sheave_node::FORCE_UNSTAGE_AFTER_FORM;
    let wrong = || invalid(format!("option {FORCE_UNSTAGE_AFTER}: write {form}"));
    parse_force_unstage_after(&text).map_or_else(wrong, Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(json: &str, why: &str) {
        let error = Options::parse(json).expect_err("refused").to_string();
        assert!(error.contains(why), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn options_are_those_of_the_volume_and_of_kubernetes() {
        let json = r#"{"kubernetes.io/fsType":"xfs","kubernetes.io/readwrite":"ro",
            "kubernetes.io/pvOrVolumeName":"pv1","kubernetes.io/secret/k":"aHVudGVyMg==",
            "kubernetes.io/mounterArgs.FsGroup":"7","kubernetes.io/pod.uid":"u",
            "volume":"fast/db","front":"nbd","mount-options":"noatime,discard",
            "force-unstage-after":"60"}"#;
        let options = Options::parse(json).expect("good");
        assert_eq!(options.volume, "fast/db");
        let given = vec!["noatime,discard".to_owned()];
        assert_eq!(options.access, Access::Mount { fs: Fs::Xfs, options: given });
        assert!(options.read_only);
        assert_eq!(options.front, Front::Nbd);
        assert_eq!(options.force_unstage_after, Some(Duration::from_secs(60)));
        assert_eq!(options.claim, "pv1");
        let least = Options::parse(r#"{"volume":"fast/db"}"#).expect("good");
        assert_eq!(least.access, Access::Mount { fs: Fs::Ext4, options: Vec::new() });
        assert!(!least.read_only);
    }

    #[test]
    fn rule_14_wrong_options_are_named_and_secrets_are_not_quoted() {
        refused("", "no JSON object");
        refused(r#""hunter2""#, "no JSON object");
        refused(r#"{"volume":"fast/db","kubernetes.io/secret/k":["hunter2"]}"#, "no JSON object");
        refused("{}", "option volume is missing");
        refused(r#"{"volume":""}"#, "option volume is missing");
        refused(r#"{"volume":"fast/db","fstype":"xfs"}"#, "known: volume, front, mount-options");
        refused(r#"{"volume":"fast/db","kubernetes.io/fsType":"hunter2"}"#, "ext4, xfs, btrfs");
        refused(r#"{"volume":"fast/db","kubernetes.io/readwrite":"hunter2"}"#, "neither");
        refused(r#"{"volume":"fast/db","front":"hunter2"}"#, "write auto, ublk or nbd");
        refused(r#"{"volume":"fast/db","force-unstage-after":"9"}"#, "from 10 to 86400");
    }
}
