//! Sizes, as the specification has them.

use sheave_csi_proto::v1::CapacityRange;
use tonic::Status;

/// The sizes that a caller accepts, in bytes; 0 is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SizeRange {
    pub(crate) required_bytes: u64,
    pub(crate) limit_bytes: u64,
}

impl SizeRange {
    /// Checks a range. Without one, every size is accepted.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for a size below 0, OUT_OF_RANGE where no size fits.
    pub(crate) fn parse(range: Option<&CapacityRange>) -> Result<Self, Status> {
        let range = range.copied().unwrap_or_default();
        let bytes = |what: &str, bytes: i64| {
            let negative = |_| Status::invalid_argument(format!("{what} is negative"));
            u64::try_from(bytes).map_err(negative)
        };
        let required_bytes = bytes("required_bytes", range.required_bytes)?;
        let limit_bytes = bytes("limit_bytes", range.limit_bytes)?;
        if limit_bytes != 0 && required_bytes > limit_bytes {
            let why =
                format!("required_bytes {required_bytes} is more than limit_bytes {limit_bytes}");
            return Err(Status::out_of_range(why));
        }
        Ok(Self { required_bytes, limit_bytes })
    }

    /// Checks the size of a volume.
    ///
    /// # Errors
    /// OUT_OF_RANGE for one over the limit.
    pub(crate) fn check_limit(self, size_bytes: u64) -> Result<(), Status> {
        match self.limit_bytes {
            0 => Ok(()),
            limit if size_bytes <= limit => Ok(()),
            limit => Err(Status::out_of_range(format!(
                "the volume has {size_bytes} bytes, and limit_bytes is {limit}; volumes never \
                 shrink"
            ))),
        }
    }
}

/// A number of the control API or the kernel in a message of CSI.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn rule_04_sizes_are_checked() {
        let range = |required_bytes, limit_bytes| {
            let range = SizeRange::parse(Some(&CapacityRange { required_bytes, limit_bytes }));
            range.map_err(|status| status.code())
        };
        assert_eq!(range(2, 1).err(), Some(Code::OutOfRange));
        assert_eq!(range(-1, 0).err(), Some(Code::InvalidArgument));
        assert_eq!(range(0, -1).err(), Some(Code::InvalidArgument));
        let limited = range(0, 5).expect("good");
        assert_eq!(limited.check_limit(6).unwrap_err().code(), Code::OutOfRange);
        assert!(limited.check_limit(5).is_ok());
        assert!(range(5, 0).expect("good").check_limit(u64::MAX).is_ok());
        assert_eq!(SizeRange::parse(None).expect("good"), SizeRange::default());
    }
}
