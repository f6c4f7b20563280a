//! Peers that misbehave in a session.

use std::fs;
use std::net::TcpStream;
use std::time::Duration;

use sheave_tests::{
    Bystander, PATIENCE, Scratch, Serve, Server, Wire, both_engines, cmd, errno, eventually, flag,
    opt, option_header, pattern, request_header,
};

both_engines! {
    fn a_wrong_magic_ends_the_connection(engine) {
        let mut server = memory(engine);
        let mut bystander = Bystander::new(&server);
        let mut request = request_header(0, cmd::READ, 1, 0, 512);
        request[3] ^= 1;
        let garbage = [
            request,
            option_header(opt::GO, 6).repeat(2),
            // The magic of replies.
            0x6744_6698_u32.to_be_bytes().repeat(8),
            pattern(1 << 20, 6),
        ];
        for bytes in garbage {
            let mut wire = ready(&server);
            drop(wire.send(&bytes));
            assert!(wire.is_closed(), "{:?}…", &bytes[..8]);
        }
        bystander.check(&mut server);
    }

    fn what_came_before_the_garbage_is_answered_or_the_end(engine) {
        let mut server = memory(engine);
        let mut bystander = Bystander::new(&server);
        let mut wire = ready(&server);
        let mut bytes = request_header(0, cmd::FLUSH, 7, 0, 0);
        bytes.extend([0; 28]);
        wire.send(&bytes).expect("send");
        if let Ok(error) = wire.simple_reply(7) {
            assert_eq!(error, 0);
        }
        assert!(wire.is_closed());
        bystander.check(&mut server);
    }

    fn unknown_commands_and_flags_are_invalid(engine) {
        let mut server = memory(engine);
        let mut bystander = Bystander::new(&server);
        let mut wire = ready(&server);
        for command in [8, 9, 77, u16::MAX] {
            wire.request(command, 1, 0, 512).expect("send");
            assert_eq!(wire.simple_reply(1).expect("a reply"), errno::EINVAL, "{command}");
        }
        for flags in [1 << 6, 1 << 15, flag::NO_HOLE] {
            wire.send(&request_header(flags, cmd::READ, 2, 0, 512)).expect("send");
            assert_eq!(wire.simple_reply(2).expect("a reply"), errno::EINVAL, "{flags:#x}");
            // The payload of a refused write is taken out of the stream, too.
            wire.send(&request_header(flags, cmd::WRITE, 3, 0, 70_000)).expect("send");
            wire.send(&pattern(70_000, 7)).expect("send");
            assert_eq!(wire.simple_reply(3).expect("a reply"), errno::EINVAL, "{flags:#x}");
        }
        wire.request(cmd::BLOCK_STATUS, 4, 0, 512).expect("send");
        assert_eq!(wire.simple_reply(4).expect("a reply"), errno::EINVAL, "no context");
        assert!(wire.read(0, 70_000).expect("a reply").expect("data").iter().all(|&b| b == 0));
        bystander.check(&mut server);
    }

    fn refused_writes_change_nothing(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let server = Serve::new(&image).engine(engine).unix();
        let mut wire = ready(&server);
        let size = 8 << 20;
        for (at, len) in [(size, 512), (size - 511, 512), (u64::MAX - 511, 512), (1 << 63, 512)] {
            wire.send(&request_header(0, cmd::WRITE, 1, at, len)).expect("send");
            wire.send(&vec![0xaa; len as usize]).expect("send");
            assert_eq!(wire.simple_reply(1).expect("a reply"), errno::ENOSPC, "{at}");
            wire.request(cmd::WRITE_ZEROES, 2, at, len).expect("send");
            assert_eq!(wire.simple_reply(2).expect("a reply"), errno::ENOSPC, "{at}");
            for command in [cmd::READ, cmd::TRIM] {
                wire.request(command, 3, at, len).expect("send");
                assert_eq!(wire.simple_reply(3).expect("a reply"), errno::EINVAL, "{at}");
            }
        }
        drop(wire);
        drop(server);
        assert!(fs::read(&image).expect("image") == pattern(8 << 20, 1), "the image is unchanged");
    }

    fn lengths_of_zero_are_survived(engine) {
        let mut server = memory(engine);
        let mut bystander = Bystander::new(&server);
        let mut wire = ready(&server);
        for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::FLUSH] {
            wire.request(command, 5, 4096, 0).expect("send");
            let error = wire.simple_reply(5).expect("a reply");
            assert!([0, errno::EINVAL].contains(&error), "{command}: {error}");
        }
        bystander.check(&mut server);
    }

    fn oversized_reads_are_refused(engine) {
        let server = Serve::new("memory:?size=1T").engine(engine).unix();
        let mut server = server;
        let mut bystander = Bystander::new(&server);
        let before = server.rss_kib();
        let mut wire = ready(&server);
        for len in [1 << 30, u32::MAX] {
            wire.request(cmd::READ, 6, 0, len).expect("send");
            let error = wire.simple_reply(6).expect("a reply");
            assert!([errno::EINVAL, errno::EOVERFLOW].contains(&error), "{len}: {error}");
        }
        // Without a payload a long request is a good one: the kernel's client zeroes so.
        wire.request(cmd::WRITE_ZEROES, 7, 1 << 30, !511).expect("send");
        assert_eq!(wire.simple_reply(7).expect("a reply"), 0);
        wire.request(cmd::TRIM, 8, 1 << 30, !511).expect("send");
        assert_eq!(wire.simple_reply(8).expect("a reply"), 0);
        assert!(server.rss_kib() < before + (16 << 10), "memory for what is refused");
        bystander.check(&mut server);
    }

    fn oversized_writes_do_not_allocate(engine) {
        let server = Serve::new("memory:?size=1T").engine(engine).unix();
        let mut server = server;
        let mut bystander = Bystander::new(&server);
        let before = server.rss_kib();
        let mut wires = Vec::new();
        for _ in 0..8 {
            let mut wire = ready(&server);
            wire.set_timeout(Duration::from_secs(1));
            wire.send(&request_header(0, cmd::WRITE, 9, 16 << 20, u32::MAX)).expect("send");
            let chunk = vec![0x77; 1 << 20];
            drop((0..16).try_for_each(|_| wire.send(&chunk)));
            wires.push(wire);
        }
        bystander.check(&mut server);
        let grown = server.rss_kib().saturating_sub(before);
        assert!(grown < 32 << 10, "{grown} KiB for writes that are too long");
        drop(wires);
        let mut wire = ready(&server);
        let data = wire.read(16 << 20, 1 << 20).expect("a reply").expect("data");
        assert!(data.iter().all(|&byte| byte == 0), "a refused write left data");
    }

    fn truncated_writes_spare_everything_else(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let mut server = Serve::new(&image).engine(engine).unix();
        let (at, len) = (1 << 20, 256 << 10);
        for cut in [0, 1, 27, 28, 29, 4096, 16 << 10, (64 << 10) + 1, 200_000, len + 27] {
            let mut wire = ready(&server);
            let mut bytes = request_header(0, cmd::WRITE, 1, at, len as u32);
            bytes.extend(vec![0xee; len]);
            wire.send(&bytes[..cut]).expect("send");
            wire.stop_sending();
            assert!(wire.is_closed(), "cut after {cut} bytes");
        }
        assert!(server.is_alive());
        drop(server);
        let (got, want) = (fs::read(&image).expect("image"), pattern(8 << 20, 1));
        let (at, end) = (at as usize, at as usize + len);
        assert!(got[..at] == want[..at] && got[end..] == want[end..], "outside the range");
    }

    fn disconnect_finishes_what_is_outstanding(engine) {
        let mut server = memory(engine);
        let mut bystander = Bystander::new(&server);
        let mut wire = ready(&server);
        wire.write(0, &pattern(65536, 8)).expect("a reply");
        let mut bytes = Vec::new();
        for cookie in 0..64 {
            bytes.extend(request_header(0, cmd::READ, cookie, cookie * 1024, 1024));
        }
        bytes.extend(request_header(0, cmd::DISC, 99, 0, 0));
        // After the goodbye nothing counts.
        bytes.extend(request_header(0, cmd::WRITE_ZEROES, 100, 0, 65536));
        wire.send(&bytes).expect("send");
        let mut seen = [false; 64];
        for _ in 0..64 {
            let (error, cookie) = wire.any_simple_reply().expect("a reply");
            assert_eq!(error, 0);
            let data = wire.receive_vec(1024).expect("data");
            let at = cookie as usize * 1024;
            assert!(data == pattern(65536, 8)[at..at + 1024]);
            assert!(!std::mem::replace(&mut seen[cookie as usize], true), "two replies");
        }
        assert!(wire.receive::<1>().is_err(), "nothing comes after the goodbye");
        let mut wire = ready(&server);
        assert!(wire.read(0, 65536).expect("a reply").expect("data") == pattern(65536, 8));
        bystander.check(&mut server);
    }

    fn equal_cookies_are_echoed(engine) {
        let server = memory(engine);
        let mut wire = ready(&server);
        for _ in 0..32 {
            wire.request(cmd::READ, 0xdead_beef, 0, 16).expect("send");
        }
        for _ in 0..32 {
            assert_eq!(wire.simple_reply(0xdead_beef).expect("a reply"), 0);
            wire.receive::<16>().expect("data");
        }
    }

    fn a_client_that_stops_reading_holds_up_only_itself(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 16 << 20);
        let mut server = Serve::new(&image).engine(engine).unix();
        let mut bystander = Bystander::new(&server);
        let before = server.rss_kib();
        let mut stuck: Vec<_> = (0..4).map(|_| stop_reading(&server)).collect();
        for _ in 0..3 {
            bystander.check(&mut server);
        }
        let grown = server.rss_kib().saturating_sub(before);
        assert!(grown < 4 * (80 << 10), "{grown} KiB for unread replies");
        // When it reads again, it gets what it asked for.
        let (wire, asked) = &mut stuck[0];
        wire.set_timeout(PATIENCE);
        let want = pattern(16 << 20, 1);
        for _ in 0..*asked {
            let (error, cookie) = wire.any_simple_reply().expect("a late reply");
            assert_eq!(error, 0);
            let at = (cookie as usize % 6) << 20;
            assert!(wire.receive_vec(1 << 20).expect("late data") == want[at..at + (1 << 20)]);
        }
        drop(stuck);
        bystander.check(&mut server);
    }

    fn a_reset_in_the_middle_of_a_write_is_survived(engine) {
        let mut server = Serve::new("memory:?size=16M").engine(engine).tcp();
        let mut bystander = Bystander::new(&server);
        bystander.check(&mut server);
        let fds = server.fds();
        for round in 0..200_usize {
            let stream = TcpStream::connect(("127.0.0.1", server.port())).expect("connect");
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))
                .expect("linger");
            let mut wire = Wire::tcp(stream).expect("a socket");
            wire.handshake().expect("greeting");
            wire.go("").expect("go");
            for cookie in 0..16 {
                wire.request(cmd::READ, cookie, 0, 65536).expect("send");
            }
            let mut bytes = request_header(0, cmd::WRITE, 99, 1 << 20, 1 << 20);
            bytes.extend(vec![0xcc; round * 5000]);
            wire.send(&bytes).expect("send");
        }
        bystander.check(&mut server);
        let closed = eventually(|| server.fds() <= fds + 1);
        assert!(closed, "{} descriptors, {fds} before", server.fds());
    }
}

fn memory(engine: &str) -> Server {
    Serve::new("memory:?size=8M").engine(engine).unix()
}

fn ready(server: &Server) -> Wire {
    Wire::ready(server).expect("a negotiated connection")
}

/// Asks for megabytes until the server listens no more, or for 1 GiB, and reads nothing.
fn stop_reading(server: &Server) -> (Wire, usize) {
    let mut wire = ready(server);
    wire.set_timeout(Duration::from_millis(500));
    let mut asked = 0;
    for cookie in 0..1024 {
        // A request that is sent in part could not be continued, so send it whole or not at all:
        // 28 bytes fit or do not.
        if wire.request(cmd::READ, cookie, (cookie % 6) << 20, 1 << 20).is_err() {
            break;
        }
        asked += 1;
    }
    assert!(asked > 0);
    (wire, asked)
}
