//! fio, nbdkit as a proxy, nbd-client.

use serde_json::Value;
use sheave_tests::{Run, Scratch, Serve, Server, both_engines, compare};

const MIB: u64 = 1 << 20;

both_engines! {
    fn fio_verifies_what_it_wrote(engine) {
        let scratch = Scratch::new();
        for disk in [scratch.sparse("disk.img", 64 * MIB), "memory:?size=64M".to_owned()] {
            let server = Serve::new(&disk).engine(engine).unix();
            fio(&server, "--rw=randrw --bsrange=4k-128k --iodepth=32 --size=64M");
            fio(&server, "--rw=randwrite --bs=4k --iodepth=64 --size=16M --fsync=32");
        }
    }

    fn fio_on_several_connections(engine) {
        let server = Serve::new("memory:?size=64M").args("--shards 2").engine(engine).tcp();
        fio(&server, "--rw=randrw --bs=16k --iodepth=16 --numjobs=4 --size=16M \
             --offset_increment=16M");
    }

    fn fio_trims(engine) {
        let server = Serve::new("memory:?size=64M").engine(engine).unix();
        fio(&server, "--rw=randtrim --bs=64k --iodepth=8 --size=64M");
        fio(&server, "--rw=randwrite --bs=64k --iodepth=8 --size=64M");
    }

    fn nbdkit_stands_between(engine) {
        let scratch = Scratch::new();
        let image = scratch.ext4("fs.img", "32M");
        let server = Serve::new("memory:?size=32M").engine(engine).unix();
        // nbdkit opens a connection of its own for each client of its.
        let run = |command: &str| {
            Run::new("nbdkit").args("-U - nbd").arg(format!("socket={}", server.socket()))
                .arg("--run").arg(command).ok()
        };
        run(&format!("nbdcopy {} \"$uri\"", image.display()));
        run(&format!("nbdcopy \"$uri\" {}", scratch.file("out.img")));
        compare(&image, scratch.file("out.img"));
        let info = run("nbdinfo --json \"$uri\"");
        let info: Value = serde_json::from_str(&info).expect("JSON");
        for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
            assert_eq!(info["exports"][0][can], true, "{can} through nbdkit");
        }
        Run::new("nbdcopy").arg(server.uri()).arg(scratch.file("direct.img")).ok();
        compare(&image, scratch.file("direct.img"));
    }

    fn nbd_client_lists_exports(engine) {
        let server = Serve::new("memory:?size=1M").args("--name a-disk").engine(engine).tcp();
        let list = Run::new("/usr/sbin/nbd-client").args("-l 127.0.0.1")
            .arg(server.port().to_string()).ok();
        assert!(list.lines().any(|line| line.trim().split(':').next() == Some("a-disk")), "{list}");
    }
}

/// fio with its nbd engine; writes are verified by checksums.
fn fio(server: &Server, args: &str) {
    let report = Run::new("fio")
        .args("--name=job --ioengine=nbd --output-format=json --verify_fatal=1 --verify_dump=0")
        .args("--verify=crc32c --verify_state_save=0 --do_verify=1 --randrepeat=1")
        .arg("--group_reporting")
        .arg(format!("--uri={}", server.uri()))
        .args(args)
        .ok();
    let json = report.find('{').expect("a report");
    let report: Value = serde_json::from_str(&report[json..]).expect("JSON");
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{report:#}");
    let done = ["read", "write", "trim"].map(|kind| job[kind]["total_ios"].as_u64().expect("ios"));
    assert!(done.iter().sum::<u64>() > 0, "fio did nothing: {report:#}");
}
