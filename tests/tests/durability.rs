//! What "stable" means: seen from outside, in the system calls of the plain engine.

use std::fs;

use sheave_tests::{Run, Scratch, Serve, Wire, cmd, flag, pattern, request_header, skip};

#[test]
fn flush_and_fua_reach_the_storage_before_their_reply() {
    let scratch = Scratch::new();
    let trace = scratch.file("trace");
    let strace = ["strace", "-D", "-f", "-e", "trace=%desc", "-o", &trace];
    if !Run::new("strace").args("-f -o /dev/null true").output().status.success() {
        return skip("flush_and_fua_reach_the_storage", "strace may not trace here");
    }
    let image = scratch.filled("disk.img", 8 << 20);
    let server = Serve::new(&image).engine("threads").through(&strace).unix();
    let mut wire = Wire::ready(&server).expect("a client");
    let syncs = || {
        let trace = fs::read_to_string(&trace).expect("the trace");
        let is_sync = |line: &&str| line.contains("fdatasync(") || line.contains("RWF_DSYNC");
        trace.lines().filter(is_sync).count()
    };
    assert_eq!(wire.write(0, &pattern(4096, 2)).expect("a reply"), 0);
    assert_eq!(syncs(), 0, "a plain write is not stable, and not slow");
    wire.request(cmd::FLUSH, 1, 0, 0).expect("send");
    assert_eq!(wire.simple_reply(1).expect("a reply"), 0);
    assert_eq!(syncs(), 1, "flush");
    for (command, cookie) in [(cmd::WRITE, 2), (cmd::WRITE_ZEROES, 3), (cmd::TRIM, 4)] {
        wire.send(&request_header(flag::FUA, command, cookie, 8192, 4096)).expect("send");
        if command == cmd::WRITE {
            wire.send(&pattern(4096, 3)).expect("send");
        }
        assert_eq!(wire.simple_reply(cookie).expect("a reply"), 0);
        assert_eq!(syncs(), cookie as usize, "command {command} with FUA");
    }
}
