//! What can be refused before a volume is made, published or attached.

use crate::error::refused;
use crate::options::Options;
use crate::volumes::{Format, RAW, Record};
use crate::{Access, Result};

/// A volume that is to be staged, as it is known without its device.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// How it is to be used.
    pub access: &'a Access,
    /// See [`crate::StageRequest::may_format`].
    pub may_format: bool,
    /// Whether its device is to refuse writes.
    pub read_only: bool,
    /// Of its pool.
    pub record: &'a Record,
    /// Bytes.
    pub size: u64,
    /// It is about to be made, so nothing is on it.
    pub is_new: bool,
}

impl Wanted<'_> {
    /// Refuses what no staging can ever do. What is on the device is not known here, so staging may
    /// refuse more.
    ///
    /// # Errors
    /// [`crate::Kind::Invalid`] for mount options that cannot be used, and
    /// [`crate::Kind::Refused`] for a volume that holds something else, or on which its filesystem
    /// cannot be made.
    pub fn check(&self) -> Result<()> {
        let Access::Mount { fs, options } = self.access else { return Ok(()) };
        let options = Options::parse(options)?;
        options.check(*fs)?;
        let record = self.record;
        let never_format = record.never_format || !self.may_format;
        let read_only = self.read_only || options.is_read_only();
        match &record.format {
            _ if self.is_new && read_only => Err(refused(
                "it would be new, and no filesystem can be made on what is read-only; make it \
                 without that, or name one that exists",
            )),
            _ if never_format => Ok(()),
            Format::Done(name) if name != RAW && name != fs.name() => Err(refused(format!(
                "it holds {name}, and {} is wanted; ask for {name}, or use another volume",
                fs.name()
            ))),
            Format::Never | Format::Begun(_) if !read_only => fs.check_size(self.size),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fs, Kind};

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_can_never_be_mounted_is_refused_before_anything_is_done() {
        let never = Record { format: Format::Never, never_format: false };
        let check = |fs, options: &[&str], record: &Record, change: &dyn Fn(&mut Wanted<'_>)| {
            let options = options.iter().map(|&option| option.to_owned()).collect();
            let access = Access::Mount { fs, options };
            let (may_format, read_only, size) = (true, false, 200 * MIB);
            let mut wanted =
                Wanted { access: &access, may_format, read_only, record, size, is_new: false };
            change(&mut wanted);
            wanted.check().map_err(|error| error.kind())
        };
        let unchanged: &dyn Fn(&mut Wanted<'_>) = &|_| {};
        assert_eq!(check(Fs::Ext4, &["noatime"], &never, unchanged), Ok(()));
        assert_eq!(check(Fs::Ext4, &["noatime,bind"], &never, unchanged), Err(Kind::Invalid));
        assert_eq!(check(Fs::Ext4, &[], &never, &|of| of.size = MIB), Ok(()));
        if Options::parse(&[]).expect("none").check(Fs::Xfs).is_ok() {
            assert_eq!(check(Fs::Xfs, &[], &never, unchanged), Err(Kind::Refused), "too small");
            assert_eq!(check(Fs::Xfs, &[], &never, &|of| of.size = 300 * MIB), Ok(()));
            // What is there may be smaller.
            assert_eq!(check(Fs::Xfs, &[], &never, &|of| of.may_format = false), Ok(()));
            assert_eq!(check(Fs::Xfs, &[], &never, &|of| of.read_only = true), Ok(()));
        }
        let done = |name: &str| {
            let format = Format::Done(name.to_owned());
            Record { format, never_format: false }
        };
        assert_eq!(check(Fs::Ext4, &[], &done("xfs"), unchanged), Err(Kind::Refused));
        for name in ["ext4", RAW] {
            assert_eq!(check(Fs::Ext4, &[], &done(name), unchanged), Ok(()));
        }
        let of_new: &dyn Fn(&mut Wanted<'_>) = &|of| of.is_new = true;
        assert_eq!(check(Fs::Ext4, &[], &never, of_new), Ok(()));
        assert_eq!(check(Fs::Ext4, &["ro"], &never, of_new), Err(Kind::Refused));
        assert_eq!(check(Fs::Ext4, &["ro"], &never, unchanged), Ok(()), "something may be there");
    }
}
