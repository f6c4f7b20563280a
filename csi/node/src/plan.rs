//! What to do with a device before it is mounted. This is where it is decided that nothing is
//! formatted that may hold data.

use crate::error::refused;
use crate::fs::Fs;
use crate::probe::{Content, FsInfo, Signature, list};
use crate::volumes::{Format, RAW, Record};
use crate::{Error, Result};

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Mount what is there.
    Mount(FsInfo),
    /// Record first that it is formatted: it is there, and the record does not say so.
    MarkAndMount(FsInfo),
    /// Make the filesystem. No user can have written anything.
    Format,
    /// A filesystem whose making was interrupted, perhaps after its end. If it is whole, mount it,
    /// else make it again: it was never mounted by this engine.
    FinishFormat(FsInfo),
}

/// Why a volume cannot be used, for its health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) why: String,
    /// Whether data that was there is lost.
    pub(crate) lost: bool,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        refused(refusal.why)
    }
}

/// Decides from what is wanted, what the volume's record says and what is on the device.
///
/// # Errors
/// When it cannot be mounted as wanted, and must not be formatted.
pub(crate) fn plan(
    fs: Fs,
    read_only: bool,
    record: &Record,
    content: &Content,
) -> Result<Plan, Refusal> {
    match content {
        Content::One(found) => plan_with_signature(fs, read_only, record, found),
        Content::Several(all) => match recorded_signature(fs, record, all) {
            Some(found) => plan_with_signature(fs, read_only, record, found),
            None => refuse(format!(
                "it holds signatures of several kinds of data, {}; it is neither mounted nor \
                 formatted: wipe those that are stale (wipefs -o), or use another volume",
                list(all)
            )),
        },
        Content::Backups(all) => {
            let is_unfinished = |name: &str| all.iter().all(|backup| backup.name == name);
            match &record.format {
                Format::Begun(name) if is_unfinished(name) => {
                    plan_without_signature(fs, read_only, record, "")
                }
                _ => lost(format!(
                    "its main superblock is gone, and backups are there ({}): nothing is \
                     formatted; repair it by hand (e2fsck -b, xfs_repair, btrfs rescue) or \
                     restore the volume",
                    list(all)
                )),
            }
        }
        Content::Unknown(at) => plan_without_signature(
            fs,
            read_only,
            record,
            &format!("unknown data from byte {at} on"),
        ),
        Content::Empty => plan_without_signature(fs, read_only, record, ""),
    }
}

/// The filesystem that the record names, if what else was found lies in what it owns: a file's
/// content can look like anything.
fn recorded_signature<'a>(fs: Fs, record: &Record, all: &'a [Signature]) -> Option<&'a Signature> {
    let Format::Done(name) = &record.format else { return None };
    let found = all.iter().find(|found| found.name == fs.name() && found.name == name)?;
    all.iter().all(|other| other.at >= found.at).then_some(found)
}

/// A main signature is there.
fn plan_with_signature(
    fs: Fs,
    read_only: bool,
    record: &Record,
    found: &Signature,
) -> Result<Plan, Refusal> {
    let Some(info) = found.fs.clone().filter(|_| found.name == fs.name()) else {
        return refuse(format!(
            "it holds {}, and {} is wanted; it is neither mounted nor formatted: ask for the \
             type that is there, or use another volume",
            found.name,
            fs.name()
        ));
    };
    match &record.format {
        _ if record.never_format => Ok(Plan::Mount(info)),
        Format::Done(name) if name == fs.name() || name == RAW => Ok(Plan::Mount(info)),
        Format::Done(name) => refuse(format!(
            "it holds {}, and its record says {name}; it may be another volume's data: check \
             what its pool has",
            fs.name()
        )),
        Format::Never if read_only => Ok(Plan::Mount(info)),
        Format::Never => Ok(Plan::MarkAndMount(info)),
        Format::Begun(_) if read_only => refuse(unfinished()),
        Format::Begun(_) if !info.clean => refuse(
            "its first formatting was interrupted, and what is there was mounted since, not by \
             this program; check it by hand and mount it once read-write",
        ),
        Format::Begun(_) => Ok(Plan::FinishFormat(info)),
    }
}

/// No main signature is there; `unknown` names what else is.
fn plan_without_signature(
    fs: Fs,
    read_only: bool,
    record: &Record,
    unknown: &str,
) -> Result<Plan, Refusal> {
    let there = if unknown.is_empty() { "nothing" } else { unknown };
    match &record.format {
        _ if record.never_format => refuse(format!(
            "there is {there} on it, and it is never formatted, as its content came from \
             elsewhere: put {} on it there",
            fs.name()
        )),
        Format::Done(name) if name == RAW => refuse(format!(
            "there is {there} on it, and a program had it as a raw block device, so it is not \
             formatted: put {} on it there, or use another volume",
            fs.name()
        )),
        Format::Done(name) => lost(format!(
            "it was formatted as {name}, and there is {there} on it now: its data is lost or it \
             is another volume's; nothing is formatted: check its pool, or restore the volume"
        )),
        Format::Never if !unknown.is_empty() => refuse(format!(
            "there is {unknown} on it although it was never used; it is not formatted: wipe it \
             if nothing needs it, or use another volume"
        )),
        Format::Never if read_only => refuse(format!(
            "it was never formatted, and it is to be read only: mount it once read-write, which \
             makes {} on it",
            fs.name()
        )),
        Format::Begun(_) if read_only => refuse(unfinished()),
        Format::Never | Format::Begun(_) => Ok(Plan::Format),
    }
}

fn unfinished() -> &'static str {
    "its first formatting was interrupted, and it is to be read only: mount it once read-write"
}

fn refuse<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { why: why.into(), lost: false })
}

fn lost<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { why: why.into(), lost: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(clean: bool) -> FsInfo {
        FsInfo { size: 1 << 30, block: 4096, clean, was_mounted: false }
    }

    fn sign(name: &'static str, at: u64) -> Signature {
        let is_fs = matches!(name, "ext4" | "xfs");
        Signature { name, at, fs: is_fs.then(|| info(true)) }
    }

    fn record(format: Format) -> Record {
        Record { format, never_format: false }
    }

    fn static_volume() -> Record {
        Record { format: Format::Never, never_format: true }
    }

    fn done(fs: &str) -> Record {
        record(Format::Done(fs.to_owned()))
    }

    fn begun(fs: &str) -> Record {
        record(Format::Begun(fs.to_owned()))
    }

    fn ext4() -> Content {
        Content::One(sign("ext4", 1024))
    }

    #[track_caller]
    fn check(record: &Record, content: &Content, want: Option<Plan>) {
        assert_eq!(plan(Fs::Ext4, false, record, content).ok(), want, "{record:?} {content:?}");
    }

    /// All states of the record, with all that can be on the device: mkfs needs both.
    #[test]
    fn rule_16_only_a_volume_never_formatted_and_empty_everywhere_is_formatted() {
        let backups = Content::Backups(vec![sign("ext4", 128 << 20)]);
        let contents = [
            Content::Empty,
            Content::Unknown(7),
            ext4(),
            Content::One(sign("xfs", 0)),
            Content::One(sign("LUKS", 0)),
            Content::Several(vec![sign("ext4", 1024), sign("GPT", 512)]),
            backups.clone(),
        ];
        let records = [
            record(Format::Never),
            begun("ext4"),
            begun("xfs"),
            done("ext4"),
            done("xfs"),
            done(RAW),
            static_volume(),
        ];
        let mut formatted = Vec::new();
        for record in &records {
            for content in &contents {
                if plan(Fs::Ext4, false, record, content) == Ok(Plan::Format) {
                    formatted.push((record.clone(), content.clone()));
                }
                let read_only = plan(Fs::Ext4, true, record, content);
                assert!(matches!(read_only, Err(_) | Ok(Plan::Mount(_))), "{record:?} {content:?}");
            }
        }
        // What an interrupted mkfs leaves may look like anything but a whole filesystem.
        let want = [
            (record(Format::Never), Content::Empty),
            (begun("ext4"), Content::Empty),
            (begun("ext4"), Content::Unknown(7)),
            (begun("ext4"), backups),
            (begun("xfs"), Content::Empty),
            (begun("xfs"), Content::Unknown(7)),
        ];
        assert_eq!(formatted, want);
    }

    #[test]
    fn rule_16_static_volumes_are_mounted_and_never_formatted() {
        check(&static_volume(), &ext4(), Some(Plan::Mount(info(true))));
        check(&static_volume(), &Content::Empty, None);
    }

    #[test]
    fn rule_18_a_formatted_volume_without_superblocks_is_lost_and_not_formatted() {
        for content in [Content::Empty, Content::Unknown(0)] {
            let refusal = plan(Fs::Ext4, false, &done("ext4"), &content).unwrap_err();
            assert!(refusal.lost, "{refusal:?}");
            assert!(refusal.why.contains("was formatted as ext4"), "{refusal:?}");
        }
        check(&done("ext4"), &ext4(), Some(Plan::Mount(info(true))));
    }

    #[test]
    fn rule_19_another_type_is_not_mounted() {
        for record in [record(Format::Never), done("xfs"), done("ext4"), static_volume()] {
            check(&record, &Content::One(sign("xfs", 0)), None);
        }
        check(&done("xfs"), &ext4(), None);
        check(&done(RAW), &ext4(), Some(Plan::Mount(info(true))));
        check(&record(Format::Never), &ext4(), Some(Plan::MarkAndMount(info(true))));
    }

    #[test]
    fn an_interrupted_formatting_is_finished_unless_it_was_mounted() {
        check(&begun("ext4"), &ext4(), Some(Plan::FinishFormat(info(true))));
        let unclean = Signature { fs: Some(info(false)), ..sign("ext4", 1024) };
        check(&begun("ext4"), &Content::One(unclean), None);
    }

    #[test]
    fn what_looks_like_a_signature_in_a_file_does_not_matter() {
        let several = |at| Content::Several(vec![sign("ext4", 1024), sign("iso9660", at)]);
        check(&done("ext4"), &several(32769), Some(Plan::Mount(info(true))));
        check(&done("ext4"), &several(0), None);
        check(&record(Format::Never), &several(32769), None);
    }
}
