//! qemu-img and qemu-io.

use std::fs;

use serde_json::Value;
use sheave_tests::{Run, Scratch, Serve, Server, both_engines, compare, pattern};

const MIB: u64 = 1 << 20;

both_engines! {
    fn convert_out_and_compare(engine) {
        let scratch = Scratch::new();
        let image = scratch.ext4("fs.img", "48M");
        let server = Serve::new(&image).args("--read-only").engine(engine).unix();
        let uri = server.uri();
        let out = scratch.file("out.qcow2");
        qemu_img("convert -f raw -O qcow2").arg(&uri).arg(&out).ok();
        qemu_img("compare -f qcow2 -F raw").arg(&out).arg(&uri).ok();
        qemu_img("check -f qcow2").arg(&out).ok();
        qemu_img("convert -f qcow2 -O raw").arg(&out).arg(scratch.file("raw.img")).ok();
        compare(&image, scratch.file("raw.img"));
    }

    fn convert_in(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("from.img", 32 * MIB);
        for disk in [scratch.filled("disk.img", 32 << 20), "memory:?size=32M".to_owned()] {
            let server = Serve::new(&disk).engine(engine).unix();
            qemu_img("convert -n -W -m 8 -f raw -O raw").arg(&image).arg(server.uri()).ok();
            qemu_img("compare -f raw -F raw").arg(&image).arg(server.uri()).ok();
            qemu_img("convert -n -t none -f raw -O raw").arg(server.uri())
                .arg(scratch.sparse("out.img", 32 * MIB)).ok();
            compare(&image, scratch.file("out.img"));
        }
    }

    fn compare_sees_one_wrong_byte(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 8 * MIB);
        let server = Serve::new(&image).args("--read-only").engine(engine).unix();
        let mut bytes = fs::read(&image).expect("image");
        bytes[5_000_001] ^= 1;
        fs::write(scratch.file("wrong.img"), bytes).expect("write a file");
        let wrong = scratch.file("wrong.img");
        let output = qemu_img("compare -f raw -F raw").arg(wrong).arg(server.uri()).output();
        assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    }

    fn map_agrees_with_the_file(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 32 * MIB);
        let server = Serve::new(&image).args("--read-only").engine(engine).unix();
        assert_eq!(zero_ranges(&server.uri()), zero_ranges(&image));
        let server = Serve::new("memory:?size=1T").engine(engine).unix();
        assert_eq!(zero_ranges(&server.uri()), [(0, 1 << 40)]);
    }

    fn bench_reads_and_writes(engine) {
        let server = Serve::new("memory:?size=64M").engine(engine).unix();
        for args in ["", "-w --pattern 7 --flush-interval 64", "-w -s 256k -d 8 -c 500"] {
            qemu_img("bench -f raw -n -c 5000 -d 32").args(args).arg(server.uri()).ok();
        }
    }

    fn qemu_io_verifies_patterns(engine) {
        let scratch = Scratch::new();
        for disk in [scratch.sparse("disk.img", 16 * MIB), "memory:?size=16M".to_owned()] {
            let server = Serve::new(&disk).engine(engine).unix();
            qemu_io(&server, "-f raw", &[
                "write -P 1 0 1M",
                "write -P 2 -f 513k 3k",
                "write -P 3 1000 77",
                "aio_write -P 4 2M 1M",
                "aio_write -P 5 3M 1M",
                "aio_flush",
                "write -z 4M 64k",
                "write -z -u 2M 64k",
                "discard 8M 1M",
                "flush",
                "read -P 1 0 1000",
                "read -P 3 1000 77",
                "read -P 1 1077 524235",
                "read -P 2 513k 3k",
                "read -P 0 2M 64k",
                "read -P 4 2162688 983040",
                "read -P 5 3M 1M",
                "read -P 0 4M 64k",
            ]);
        }
    }

    fn qemu_io_cannot_write_a_read_only_export(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 1 << 20);
        let server = Serve::new(&image).args("--read-only").engine(engine).unix();
        Run::new("qemu-io").args("-f raw -c").arg("write -P 9 0 4k").arg(server.uri()).fails();
        qemu_io(&server, "-r -f raw", &["read 0 1M"]);
        assert!(fs::read(&image).expect("image") == pattern(1 << 20, 1), "the image is untouched");
    }

    fn qcow2_lives_inside_an_export(engine) {
        let server = Serve::new("memory:?size=32M").engine(engine).unix();
        qemu_img("create -q -f qcow2").arg(server.uri()).arg("64M").ok();
        qemu_io(&server, "-f qcow2", &["write -P 9 40M 2M", "discard 41M 512k", "flush"]);
        qemu_io(&server, "-f qcow2", &["read -P 9 40M 1M", "read -P 0 0 1M"]);
        qemu_img("check -f qcow2").arg(server.uri()).ok();
    }
}

fn qemu_img(args: &str) -> Run {
    Run::new("qemu-img").args(args)
}

fn qemu_io(server: &Server, args: &str, commands: &[&str]) {
    let mut run = Run::new("qemu-io").args(args);
    for command in commands {
        run = run.arg("-c").arg(command);
    }
    let said = run.arg(server.uri()).ok();
    // Some versions report a pattern that does not match, but succeed.
    assert!(!said.contains("verification failed"), "{said}");
}

/// The ranges that read as zeroes, neighbours merged.
fn zero_ranges(of: &str) -> Vec<(u64, u64)> {
    let map = qemu_img("map -f raw --output=json").arg(of).ok();
    let map: Value = serde_json::from_str(&map).expect("JSON");
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for extent in map.as_array().expect("extents").iter().filter(|extent| extent["zero"] == true) {
        let number = |name: &str| extent[name].as_u64().expect("number");
        let (start, end) = (number("start"), number("start") + number("length"));
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}
