//! Parameters of volumes, seen from the other end of the wire.

use std::time::{Duration, Instant};

use sheave_tests::{
    Run, Scratch, Serve, Wire, both_engines, compare, errno, pattern, python, sheave, skip,
};

const MIB: u64 = 1 << 20;

both_engines! {
    fn faults_hit_what_the_rule_says(engine) {
        let volume = "memory:?size=8M&fault=write:error=ENOSPC:after=3:count=2";
        let server = Serve::new(volume).engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        let errors: Vec<_> =
            (0..7).map(|_| wire.write(4096, &[7; 4096]).expect("a reply")).collect();
        assert_eq!(errors, [0, 0, 0, errno::ENOSPC, errno::ENOSPC, 0, 0]);
        let volume = "memory:?size=8M&fault=read:error=EIO:range=1M-2M";
        let server = Serve::new(volume).engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        assert_eq!(wire.read(MIB - 4096, 4097).expect("a reply"), Err(errno::EIO));
        assert!(wire.read(MIB - 4096, 4096).expect("a reply").is_ok());
        assert!(wire.read(2 * MIB, 4096).expect("a reply").is_ok());
    }

    fn delays_delay_and_do_not_block_others(engine) {
        let volume = "memory:?size=8M&fault=read:delay=2s:range=1M-2M";
        let server = Serve::new(volume).args("--shards 1").engine(engine).unix();
        let mut slow = Wire::ready(&server).expect("a client");
        let mut quick = Wire::ready(&server).expect("a client");
        let start = Instant::now();
        slow.request(sheave_tests::cmd::READ, 1, MIB, 4096).expect("send");
        for _ in 0..100 {
            quick.read(4 * MIB, 4096).expect("a reply").expect("data");
        }
        let others = start.elapsed();
        assert_eq!(slow.simple_reply(1).expect("a reply"), 0);
        let delayed = start.elapsed();
        assert!(delayed >= Duration::from_secs(2), "{delayed:?}");
        assert!(others < Duration::from_millis(1500), "others waited {others:?}");
    }

    fn limits_limit(engine) {
        let volume = "memory:?size=8M&limit-bps=4M";
        let server = Serve::new(volume).engine(engine).unix();
        let start = Instant::now();
        let mut wire = Wire::ready(&server).expect("a client");
        for at in 0..8 {
            wire.read(at * MIB, 1 << 20).expect("a reply").expect("data");
        }
        let took = start.elapsed();
        assert!(took > Duration::from_millis(800), "8 MiB at 4 MiB/s took {took:?}");
        assert!(took < Duration::from_secs(15), "8 MiB at 4 MiB/s took {took:?}");
    }

    fn direct_io_takes_any_request(engine) {
        // Not every file system has O_DIRECT.
        let scratch = Scratch::on_disk();
        let image = scratch.filled("disk.img", 16 << 20);
        let probe = Run::new("dd").arg(format!("if={image}"))
            .args("of=/dev/null iflag=direct bs=4k count=1").output();
        if !probe.status.success() {
            return skip("direct_io_takes_any_request", "the file system has no O_DIRECT");
        }
        let server = Serve::new(format!("{image}?direct=true")).engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        let mut want = pattern(16 << 20, 1);
        for (at, len) in [(0, 4096), (1, 1), (511, 2), (4095, 4098), (100_001, 300_007)] {
            let data = pattern(len, at);
            assert_eq!(wire.write(at, &data).expect("a reply"), 0, "{at}+{len}");
            want[at as usize..at as usize + len].copy_from_slice(&data);
            let (from, len) = (at.saturating_sub(700), len as u32 + 1500);
            let got = wire.read(from, len).expect("a reply").expect("data");
            assert!(got == want[from as usize..][..len as usize], "{from}+{len}");
        }
        python("in_flight.py").arg(server.uri()).args("16 any").ok();
        python("commands.py").arg(server.uri()).args("16 any").ok();
    }

    fn read_only_by_parameter(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let server = Serve::new(format!("{image}?read-only=true")).engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        assert_eq!(wire.write(0, &[1; 512]).expect("a reply"), errno::EPERM);
        drop(wire);
        drop(server);
        compare(&image, scratch.filled("want.img", 8 << 20));
    }

    fn a_terabyte_costs_nothing_until_written(engine) {
        let server = Serve::new("memory:?size=1T").engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        for step in 0..64 {
            let at = step << 34;
            assert_eq!(wire.write(at, b"here").expect("a reply"), 0);
            assert_eq!(wire.read(at, 4).expect("a reply"), Ok(b"here".to_vec()));
        }
        let rss_kib = server.rss_kib();
        assert!(rss_kib < 64 << 10, "{rss_kib} KiB");
    }

    fn null_reads_zeroes_whatever_was_written(engine) {
        let server = Serve::new("null:?size=1T").engine(engine).unix();
        let mut wire = Wire::ready(&server).expect("a client");
        assert_eq!(wire.write(MIB, &pattern(1 << 20, 3)).expect("a reply"), 0);
        let data = wire.read(MIB, 1 << 20).expect("a reply").expect("data");
        assert!(data.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn clients_are_told_the_logical_block_of_the_disk() {
    const SCRIPT: &str = "import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
least, size = h.get_block_size(nbd.SIZE_MINIMUM), h.get_size()
assert least == int(sys.argv[2]), least
assert size % least == 0 and h.get_block_size(nbd.SIZE_PREFERRED) == 4096
h.pwrite(b'odd', 4097)
assert h.pread(3, 4097) == b'odd'";
    let scratch = Scratch::on_disk();
    let image = scratch.filled("disk.img", 1 << 20);
    let cases = [("", "1"), ("?block=512", "1"), ("?block=2048", "2048"), ("?block=4K", "4096")];
    for (parameters, least) in cases {
        let server = Serve::new(format!("{image}{parameters}")).unix();
        // It asks for the sizes, and sends less all the same.
        let client = Run::new("/usr/bin/python3").arg("-c").arg(SCRIPT);
        client.arg(server.uri()).arg(least).ok();
    }
    let odd = scratch.filled("odd.img", 5000);
    let serve = Run::new(sheave()).arg("serve").arg(format!("{odd}?block=4096"));
    let refused = serve.args("--listen 127.0.0.1:0").fails();
    assert!(refused.contains("truncate -s %4096"), "{refused}");
}

#[test]
fn images_in_other_formats_are_served_with_a_warning() {
    let scratch = Scratch::on_disk();
    let image = scratch.filled("disk.qcow2", 1 << 20);
    let count = |parameters: &str| {
        let log = Serve::new(format!("{image}{parameters}")).unix().log();
        log.lines().filter(|line| line.contains("WARN") && line.contains("qcow2 image")).count()
    };
    assert_eq!(count(""), 0);
    let mut bytes = std::fs::read(&image).expect("an image");
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    std::fs::write(&image, bytes).expect("an image");
    for (parameters, lines) in
        [("", 1), ("?direct=true", 1), ("?read-only=true", 1), ("?format=raw", 0)]
    {
        assert_eq!(count(parameters), lines, "{parameters}");
    }
}
