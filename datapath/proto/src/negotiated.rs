//! The result of a negotiation, and the flags and block sizes of a volume.

use sheave_core::VolumeInfo;

use crate::context::ContextSet;
use crate::wire::{
    BLOCK_STATUS_EXTENTS_MAX, MINIMUM_BLOCK_MAX, PAYLOAD_MAX_MIN, ReplyStyle, transmission_flag,
};

/// The logical block of most disks, which every client assumes.
const LOGICAL_BLOCK_DEFAULT: u32 = 512;

/// The result of a server's negotiation with one client, for the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Index of the export, as [`crate::Exports::find`] gave it.
    pub export: usize,
    /// The style of requests and replies.
    pub style: ReplyStyle,
    /// The contexts of a block status request without a filter.
    pub contexts: ContextSet,
    /// The client requested the block sizes, and so promised to respect them. Requests of other
    /// clients may have any alignment; a layer below must handle that.
    pub block_size_asked: bool,
    /// Flags that were sent to the client ([`transmission_flag`]).
    pub transmission_flags: u16,
    /// Bytes that this client can use: the size of the volume when the connection was negotiated,
    /// unless the client can learn of growth.
    pub size: u64,
    /// The volume as it was described to the client.
    pub info: VolumeInfo,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

impl Negotiated {
    /// The most extents in one answer to a block status request, for
    /// [`sheave_core::Op::BlockStatus`].
    #[must_use]
    pub fn extents_max(&self, req_one: bool) -> usize {
        const DESCRIPTOR_LEN: usize = 16;
        if req_one {
            return 1;
        }
        let payload_max = usize::try_from(self.info.block.maximum_payload).unwrap_or(usize::MAX);
        (payload_max / DESCRIPTOR_LEN).clamp(1, BLOCK_STATUS_EXTENTS_MAX)
    }
}

/// The flags for a client of a volume's capabilities.
#[must_use]
pub fn transmission_flags(info: &VolumeInfo, style: ReplyStyle, contexts: ContextSet) -> u16 {
    use transmission_flag as flag;
    let can = &info.can;
    let writable = !info.read_only;
    let flags = [
        (true, flag::HAS_FLAGS),
        (info.read_only, flag::READ_ONLY),
        (can.flush, flag::SEND_FLUSH),
        (can.fua, flag::SEND_FUA),
        (info.rotational, flag::ROTATIONAL),
        (writable && can.trim, flag::SEND_TRIM),
        (writable && can.write_zeroes, flag::SEND_WRITE_ZEROES),
        (style != ReplyStyle::Simple, flag::SEND_DF),
        // Without writes all connections see the same data.
        (info.read_only || can.multi_conn, flag::CAN_MULTI_CONN),
        (can.cache, flag::SEND_CACHE),
        (writable && can.write_zeroes && can.fast_zero, flag::SEND_FAST_ZERO),
        (style == ReplyStyle::Extended && !contexts.is_empty(), flag::BLOCK_STATUS_PAYLOAD),
    ];
    flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag)
}

/// The minimum block size of requests: the volume's, or less where the volume's size is not a
/// multiple of it, since clients could not reach the end otherwise. Requests of the smaller size
/// need the same layer as those of clients that did not request the block sizes.
#[must_use]
pub fn minimum_block(info: &VolumeInfo, size: u64) -> u32 {
    let fits_size = 1_u32.checked_shl(size.trailing_zeros()).unwrap_or(u32::MAX);
    info.block.minimum.min(fits_size)
}

/// The minimum block size in the reply to NBD_INFO_BLOCK_SIZE: [`minimum_block`], or the logical
/// block if it is larger than 512 bytes, so that a client which makes a disk of the export makes
/// the same disk. Smaller requests are served nevertheless.
#[must_use]
pub fn advertised_block(info: &VolumeInfo, size: u64) -> u32 {
    let minimum = minimum_block(info, size);
    let logical = info.block.logical;
    let is_stated = logical > LOGICAL_BLOCK_DEFAULT && size.is_multiple_of(logical.into());
    if is_stated { minimum.max(logical) } else { minimum }
}

/// Why a volume cannot be described to clients: the protocol has no way to express its numbers.
///
/// # Errors
/// What is wrong with it.
pub fn check_exportable(info: &VolumeInfo, size: u64) -> Result<(), &'static str> {
    let block = &info.block;
    let checks = [
        (i64::try_from(size).is_ok(), "the volume is larger than 2^63-1 bytes"),
        (
            block.minimum.is_power_of_two() && block.minimum <= MINIMUM_BLOCK_MAX,
            "the minimum block size is not a power of two up to 64 KiB",
        ),
        (
            block.logical.is_power_of_two()
                && (LOGICAL_BLOCK_DEFAULT..=MINIMUM_BLOCK_MAX).contains(&block.logical),
            "the logical block size is not a power of two from 512 to 64 KiB",
        ),
        (
            block.preferred.is_power_of_two()
                && block.preferred >= block.minimum.max(block.logical),
            "the preferred block size is not a power of two from 512 and the minimum up",
        ),
        (
            block.maximum_payload >= block.preferred.max(PAYLOAD_MAX_MIN),
            "the maximum payload is below 64 KiB or the preferred block size",
        ),
    ];
    checks.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, message)| Err(message))
}
