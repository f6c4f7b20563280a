//! The logical block of a disk is stated to clients and not required of them.

use sheave_core::BlockSizes;
use sheave_proto::wire::{command, info_type};
use sheave_proto::{Negotiated, ReplyStyle, Request, Verdict};

use crate::options::{go_with_sizes, info_of};
use crate::support::{SIZE, be32, negotiated, volume};

#[test]
fn sizes_logical_blocks_are_told_where_they_are_larger_than_usual() {
    let minimum = |size, minimum, logical| {
        let block = BlockSizes { minimum, logical, ..volume().block };
        let asked = go_with_sizes(size, block, &[info_type::BLOCK_SIZE]);
        let unasked = go_with_sizes(size, block, &[]);
        assert_eq!(be32(info_of(&unasked, info_type::BLOCK_SIZE).unwrap()), 1);
        let told = info_of(&asked, info_type::BLOCK_SIZE).unwrap();
        let [least, preferred, most] = [0, 4, 8].map(|at| be32(&told[at..]));
        // NBD, "Block size constraints".
        assert!(least.is_power_of_two() && least <= preferred && preferred <= most);
        assert!(preferred >= 512 && most.is_multiple_of(least));
        assert!(size.is_multiple_of(u64::from(least)), "the size is a multiple of the minimum");
        least
    };
    assert_eq!(minimum(SIZE, 1, 512), 1, "as every client assumes");
    assert_eq!(minimum(SIZE, 1, 1024), 1024);
    assert_eq!(minimum(SIZE, 1, 4096), 4096);
    assert_eq!(minimum(SIZE, 512, 4096), 4096);
    assert_eq!(minimum(SIZE, 4096, 512), 4096);
    assert_eq!(minimum(4096 + 512, 1, 4096), 1, "the end can be reached");
    assert_eq!(minimum(4096 + 512, 512, 4096), 512);
}

#[test]
fn sizes_requests_below_the_logical_block_are_served() {
    let mut info = volume();
    info.block = BlockSizes { minimum: 1, logical: 4096, ..info.block };
    let server = Negotiated { block_size_asked: true, ..negotiated(ReplyStyle::Simple, info) };
    let (cookie, flags, offset, length) = (1, 0, 513, 7);
    let read = Request { cookie, flags, command: command::READ, offset, length };
    let verdict = server.check(&read);
    assert!(matches!(verdict, Verdict::Read { .. }));
}
