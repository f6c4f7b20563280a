//! Numbers and structures of include/uapi/linux/ublk_cmd.h, and their bytes.
#![expect(clippy::host_endian_bytes, reason = "structures of the kernel are in the host's order")]

use sheave_core::{PAGE_SIZE, VolumeInfo};
use sheave_ring::DeviceCommand;

pub(crate) const SECTOR_SHIFT: u32 = 9;

/// Commands to /dev/ublk-control: `_IOR` or `_IOWR` of a `struct ublksrv_ctrl_cmd`.
pub(crate) mod control {
    const LEN: u32 = 32;

    pub(crate) const GET_DEV_INFO: u32 = super::ior(0x02, LEN);
    pub(crate) const ADD_DEV: u32 = super::iowr(0x04, LEN);
    pub(crate) const DEL_DEV: u32 = super::iowr(0x05, LEN);
    pub(crate) const DEL_DEV_ASYNC: u32 = super::ior(0x14, LEN);
    pub(crate) const START_DEV: u32 = super::iowr(0x06, LEN);
    pub(crate) const STOP_DEV: u32 = super::iowr(0x07, LEN);
    pub(crate) const SET_PARAMS: u32 = super::iowr(0x08, LEN);
    pub(crate) const START_USER_RECOVERY: u32 = super::iowr(0x10, LEN);
    pub(crate) const END_USER_RECOVERY: u32 = super::iowr(0x11, LEN);
    pub(crate) const GET_FEATURES: u32 = super::ior(0x13, LEN);
    pub(crate) const UPDATE_SIZE: u32 = super::iowr(0x15, LEN);
}

/// Features of a driver and of a device.
pub(crate) mod feature {
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub(crate) const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    pub(crate) const USER_COPY: u64 = 1 << 7;
    pub(crate) const AUTO_BUF_REG: u64 = 1 << 11;
    /// A feature of the driver; devices need not request it.
    pub(crate) const UPDATE_SIZE: u64 = 1 << 10;
    const BUF_REG_OFF_DAEMON: u64 = 1 << 14;
    /// The driver holds a request until its memory is not registered any more, even if the server
    /// dies. It came in the same release, Linux 6.17.
    pub(crate) const REGISTERS: u64 = AUTO_BUF_REG | BUF_REG_OFF_DAEMON;
    pub(crate) const NO_AUTO_PART_SCAN: u64 = 1 << 18;
}

/// Operations, in the lowest byte of a descriptor's `op_flags`.
pub(crate) mod operation {
    pub(crate) const READ: u8 = 0;
    pub(crate) const WRITE: u8 = 1;
    pub(crate) const FLUSH: u8 = 2;
    pub(crate) const DISCARD: u8 = 3;
    pub(crate) const WRITE_ZEROES: u8 = 5;
}

/// Flags of an operation, above it.
pub(crate) mod flag {
    pub(crate) const FUA: u32 = 1 << 13;
    pub(crate) const NOUNMAP: u32 = 1 << 15;
    /// Its memory could not be registered.
    pub(crate) const NEED_REG_BUF: u32 = 1 << 17;
}

/// The state of a device that has not been started, or has been stopped.
pub(crate) const DEAD: u16 = 0;
/// The state of a device whose server is gone.
pub(crate) const QUIESCED: u16 = 2;

/// A `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceInfo {
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) state: u16,
    pub(crate) io_max_bytes: u32,
    pub(crate) id: u32,
    pub(crate) features: u64,
    /// Data of the server, which the driver only keeps.
    pub(crate) key: u64,
}

impl DeviceInfo {
    pub(crate) const LEN: usize = 64;

    /// Whether the driver registers the memory of requests with the ring.
    pub(crate) fn registers(self) -> bool {
        self.features & feature::AUTO_BUF_REG != 0
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&self.queues.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.depth.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.io_max_bytes.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.id.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.features.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.key.to_ne_bytes());
        bytes
    }

    pub(crate) fn of_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at| u32::from_ne_bytes(*part(bytes, at));
        let u64_at = |at| u64::from_ne_bytes(*part(bytes, at));
        Self {
            queues: u16_at(0),
            depth: u16_at(2),
            state: u16_at(4),
            io_max_bytes: u32_at(8),
            id: u32_at(12),
            features: u64_at(24),
            key: u64_at(32),
        }
    }
}

/// A `struct ublk_params` with the basic part and that about discarding.
pub(crate) fn parameters(info: &VolumeInfo, size: u64, block: u32, io_max_bytes: u32) -> [u8; 60] {
    const BASIC: u32 = 1;
    const DISCARD: u32 = 1 << 1;
    // The longest that a request can express, in sectors.
    const LEN_MAX: u32 = u32::MAX >> SECTOR_SHIFT;
    let mut bytes = [0; 60];
    bytes[..4].copy_from_slice(&60_u32.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(BASIC | DISCARD).to_ne_bytes());
    bytes[8..12].copy_from_slice(&attributes(info).to_ne_bytes());
    // Logical, physical, best and least unit of I/O. What is not a multiple of the third is patched
    // into pages, or into blocks of the volume.
    let preferred = info.block.preferred.max(block);
    let physical = preferred.min(PAGE_SIZE as u32).max(block);
    let shifts = [block, physical, preferred, physical];
    bytes[12..16].copy_from_slice(&shifts.map(|len| len.ilog2() as u8));
    bytes[16..20].copy_from_slice(&(io_max_bytes >> SECTOR_SHIFT).to_ne_bytes());
    bytes[24..32].copy_from_slice(&(size >> SECTOR_SHIFT).to_ne_bytes());
    bytes[44..48].copy_from_slice(&preferred.to_ne_bytes());
    let lens = [info.can.trim, info.can.write_zeroes].map(|can| if can { LEN_MAX } else { 0 });
    bytes[48..52].copy_from_slice(&lens[0].to_ne_bytes());
    bytes[52..56].copy_from_slice(&lens[1].to_ne_bytes());
    // The driver takes no more than one range a request.
    bytes[56..58].copy_from_slice(&1_u16.to_ne_bytes());
    bytes
}

fn attributes(info: &VolumeInfo) -> u32 {
    const READ_ONLY: u32 = 1;
    const ROTATIONAL: u32 = 1 << 1;
    const VOLATILE_CACHE: u32 = 1 << 2;
    const FUA: u32 = 1 << 3;
    let all = [
        (info.read_only, READ_ONLY),
        (info.rotational, ROTATIONAL),
        (info.can.flush, VOLATILE_CACHE),
        (info.can.flush && info.can.fua, FUA),
    ];
    all.iter().filter(|(has, _)| *has).map(|(_, bit)| bit).sum()
}

/// Fetches the first request of this slot.
pub(crate) fn fetch(queue: u16, slot: u16, addr: [u8; 8]) -> DeviceCommand {
    DeviceCommand { number: iowr(0x20, 16), content: io_command(queue, slot, 0), addr }
}

/// Commits the result, and fetches the next request of this slot.
pub(crate) fn commit_and_fetch(queue: u16, slot: u16, result: i32, addr: [u8; 8]) -> DeviceCommand {
    DeviceCommand { number: iowr(0x21, 16), content: io_command(queue, slot, result), addr }
}

/// A `struct ublk_auto_buf_reg`: It makes the driver register the memory of the next request under
/// this index of the ring's table, or report that it could not. An index beyond the table always
/// fails.
pub(crate) fn auto_buf_reg(index: Option<u16>) -> [u8; 8] {
    const FALLBACK: u64 = 1 << 16;
    const BEYOND: u16 = u16::MAX;
    (u64::from(index.unwrap_or(BEYOND)) | FALLBACK).to_ne_bytes()
}

/// The offset of the data of this slot's request in the device's file.
pub(crate) fn position(queue: u16, slot: u16) -> u64 {
    const BUFFERS: u64 = 0x8000_0000;
    const SLOT_SHIFT: u32 = 25;
    const QUEUE_SHIFT: u32 = SLOT_SHIFT + 16;
    BUFFERS + (u64::from(queue) << QUEUE_SHIFT) + (u64::from(slot) << SLOT_SHIFT)
}

/// A `struct ublksrv_io_cmd`.
fn io_command(queue: u16, slot: u16, result: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&slot.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes
}

/// include/uapi/asm-generic/ioctl.h
const fn ior(number: u32, len: u32) -> u32 {
    2 << 30 | len << 16 | (b'u' as u32) << 8 | number
}

const fn iowr(number: u32, len: u32) -> u32 {
    3 << 30 | len << 16 | (b'u' as u32) << 8 | number
}

fn part<const N: usize>(bytes: &[u8; DeviceInfo::LEN], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("a field lies inside its structure")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a C program prints them that includes the header.
    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(control::ADD_DEV, 0xc020_7504);
        assert_eq!(control::GET_FEATURES, 0x8020_7513);
        assert_eq!(fetch(0, 0, [0; 8]).number, 0xc010_7520);
        assert_eq!(commit_and_fetch(0, 0, 0, [0; 8]).number, 0xc010_7521);
        assert_eq!(position(1, 2), 0x8000_0000 + (1 << 41) + (2 << 25));
    }

    #[test]
    fn a_device_has_the_logical_block_of_its_volume() {
        use sheave_core::{BlockSizes, Capabilities};

        let shifts = |minimum: u32, logical| {
            let default = BlockSizes::default();
            let preferred = default.preferred.max(minimum);
            let info = VolumeInfo {
                block: BlockSizes { minimum, logical, preferred, ..default },
                read_only: false,
                rotational: false,
                volatile: false,
                identity: None,
                can: Capabilities::ALL,
            };
            let bytes = parameters(&info, 1 << 20, logical, 1 << 20);
            assert_eq!(bytes[24..32], 2048_u64.to_ne_bytes(), "in sectors of 512, always");
            let [logical, physical, best, least] = *bytes[12..16].as_array().unwrap();
            // drivers/block/ublk_drv.c, `ublk_validate_params`.
            assert!(9 <= logical && logical <= physical && physical <= 12);
            (logical, physical, best, least)
        };
        assert_eq!(shifts(1, 512), (9, 12, 12, 12));
        assert_eq!(shifts(1, 4096), (12, 12, 12, 12));
        assert_eq!(
            shifts(4096, 512),
            (9, 12, 12, 12),
            "direct I/O takes larger blocks than it has"
        );
        assert_eq!(shifts(1 << 16, 1024), (10, 12, 16, 12));
    }

    #[test]
    fn device_info_survives_its_bytes() {
        let info = DeviceInfo {
            queues: 2,
            depth: 128,
            state: 0,
            io_max_bytes: 1 << 20,
            id: 7,
            features: feature::USER_COPY | feature::USER_RECOVERY,
            key: 0x0123_4567_89ab_cdef,
        };
        assert_eq!(DeviceInfo::of_bytes(&info.to_bytes()), info);
    }
}
