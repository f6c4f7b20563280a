//! libnbd's programs and its Python module.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use sheave_tests::{Run, Scratch, Serve, both_engines, compare, eventually, python, sheave, skip};

const MIB: u64 = 1 << 20;

both_engines! {
    fn nbdinfo_shows_the_export(engine) {
        let server = Serve::new("memory:?size=64M").args("--name disk").engine(engine).unix();
        let uri = server.uri_of("disk");
        let info: Value = serde_json::from_str(&nbdinfo("--json", &uri)).expect("JSON");
        let export = &info["exports"][0];
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        assert_eq!(export["export-name"], "disk");
        assert_eq!(export["export-size"], 64 * MIB);
        assert_eq!(export["is_read_only"], false);
        assert!(export["block_size_maximum"].as_u64().is_some_and(|max| max >= 32 * MIB));
        assert_eq!(nbdinfo("--size", &uri).trim(), (64 * MIB).to_string());
        for can in "connect flush fua multi-conn trim zero df read write".split(' ') {
            Run::new("nbdinfo").args("--can").arg(can).arg(&uri).ok();
        }
        let output = Run::new("nbdinfo").args("--is read-only").arg(&uri).output();
        assert_eq!(output.status.code(), Some(2), "{}", output.describe());
    }

    fn nbdinfo_lists_exports(engine) {
        let server = Serve::new("memory:?size=1M").args("--name a-disk").engine(engine).unix();
        let list: Value = serde_json::from_str(&nbdinfo("--list --json", &server.uri()))
            .expect("JSON");
        let names: Vec<_> = list["exports"].as_array().expect("exports").iter()
            .map(|export| export["export-name"].as_str().expect("name")).collect();
        assert_eq!(names, ["a-disk"]);
    }

    fn nbdinfo_maps_holes_and_data(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 32 * MIB);
        let server = Serve::new(&image).engine(engine).unix();
        check_map(&server.uri(), &image);
        let server = Serve::new("memory:?size=1T").engine(engine).unix();
        let map: Value = serde_json::from_str(&nbdinfo("--map --json", &server.uri()))
            .expect("JSON");
        assert!(map.as_array().expect("extents").iter().all(|extent| extent["type"] == 3));
    }

    fn nbdcopy_copies_in_and_out(engine) {
        let scratch = Scratch::new();
        let image = scratch.ext4("fs.img", "48M");
        let server = Serve::new("memory:?size=48M").engine(engine).unix();
        copy(&image, server.uri(), "");
        copy(server.uri(), scratch.file("out.img"), "--connections=4 --requests=32");
        compare(&image, scratch.file("out.img"));
        copy(server.uri(), scratch.file("sync.img"), "--synchronous --request-size=65536");
        compare(&image, scratch.file("sync.img"));
    }

    fn nbdcopy_writes_an_image(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("from.img", 32 * MIB + 4096);
        let disk = scratch.filled("disk.img", (32 * MIB + 4096) as usize);
        let mut server = Serve::new(&disk).engine(engine).unix();
        copy(&image, server.uri(), "--flush");
        compare(&image, &disk);
        assert!(server.interrupt().success(), "{}", server.log());
        compare(&image, &disk);
    }

    fn nbdcopy_between_two_servers(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 16 * MIB);
        let from = Serve::new(&image).args("--read-only").engine(engine).tcp();
        let to = Serve::new("memory:?size=16M").engine(engine).tcp();
        copy(from.uri(), to.uri(), "");
        copy(to.uri(), scratch.file("out.img"), "");
        compare(&image, scratch.file("out.img"));
    }

    fn python_speaks_every_command_to_memory(engine) {
        let server = Serve::new("memory:?size=16M").engine(engine).unix();
        python("commands.py").arg(server.uri()).args("16").ok();
    }

    fn python_speaks_every_command_to_a_file(engine) {
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 16 * MIB);
        let server = Serve::new(image).engine(engine).unix();
        python("commands.py").arg(server.uri()).args("16").ok();
    }

    fn python_keeps_many_requests_in_flight(engine) {
        let server = Serve::new("memory:?size=16M").args("--shards 2").engine(engine).unix();
        python("in_flight.py").arg(server.uri()).args("16").ok();
        let scratch = Scratch::new();
        let image = scratch.sparse("disk.img", 16 * MIB);
        let server = Serve::new(image).engine(engine).tcp();
        python("in_flight.py").arg(server.uri()).args("16").ok();
    }

    fn python_gets_the_right_errors(engine) {
        for volume in volumes(&Scratch::new()) {
            let read_only = Serve::new(&volume).args("--read-only").engine(engine).unix();
            // The second server of a file may not write while the first one reads.
            let uri = read_only.uri();
            let server = Serve::new("memory:?size=8M").engine(engine).unix();
            python("bad_requests.py").arg(server.uri()).arg(uri).ok();
        }
    }

    fn python_haggles(engine) {
        let server = Serve::new("memory:?size=8M").args("--name disk").engine(engine).unix();
        python("options.py").arg(server.socket()).arg("disk").ok();
    }

    fn libnbd_starts_the_server_by_socket_activation(engine) {
        let info = Run::new("nbdinfo").args("--size -- [").arg(sheave())
            .args("serve memory:?size=3M --engine").arg(engine).arg("]").ok();
        assert_eq!(info.trim(), (3 * MIB).to_string());
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 8 * MIB);
        Run::new("nbdcopy").arg("--").arg("[").arg(sheave()).arg("serve").arg(&image)
            .args("--engine").arg(engine).arg("]").arg(scratch.file("out.img")).ok();
        compare(image, scratch.file("out.img"));
    }

    fn nbdfuse_mounts_the_export(engine) {
        mount_by_nbdfuse(engine);
    }

    fn extended_headers_by_a_newer_libnbd(engine) {
        let Some(tools) = newer_libnbd("extended headers") else { return };
        let server = Serve::new("memory:?size=64G").engine(engine).unix();
        let info = Run::new(tools.join("nbdinfo")).args("--json").arg(server.uri()).ok();
        let info: Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["extended"], true, "{info:#}");
        Run::new(tools.join("python3")).arg(client("extended.py")).arg(server.uri()).args("64")
            .ok();
    }

    fn every_command_by_a_newer_libnbd(engine) {
        let Some(tools) = newer_libnbd("commands by a newer libnbd") else { return };
        let scratch = Scratch::new();
        let image = scratch.islands("disk.img", 16 * MIB);
        let server = Serve::new("memory:?size=16M").engine(engine).unix();
        Run::new(tools.join("python3")).arg(client("in_flight.py")).arg(server.uri()).args("16")
            .ok();
        let server = Serve::new(&image).engine(engine).unix();
        Run::new(tools.join("nbdcopy")).arg(server.uri()).arg(scratch.file("out.img")).ok();
        compare(&image, scratch.file("out.img"));
        check_map(&server.uri(), &image);
    }
}

fn nbdinfo(args: &str, uri: &str) -> String {
    Run::new("nbdinfo").args(args).arg(uri).ok()
}

fn copy(from: impl AsRef<std::ffi::OsStr>, to: impl AsRef<std::ffi::OsStr>, args: &str) {
    Run::new("nbdcopy").args(args).arg(from).arg(to).ok();
}

/// One of each kind, for tests that must hold on all.
fn volumes(scratch: &Scratch) -> Vec<String> {
    vec!["memory:?size=8M".to_owned(), scratch.filled("disk.img", 8 << 20)]
}

fn client(script: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script)
}

/// The map covers the image once, and its zeroes are zeroes.
fn check_map(uri: &str, image: &str) {
    let map: Value = serde_json::from_str(&nbdinfo("--map --json", uri)).expect("JSON");
    let bytes = fs::read(image).expect("image");
    let mut at = 0;
    let mut holes = 0;
    for extent in map.as_array().expect("extents") {
        let number = |name: &str| extent[name].as_u64().expect("number");
        assert_eq!(number("offset"), at, "{map:#}");
        let end = at + number("length");
        if number("type") & 2 != 0 {
            let zero = bytes[at as usize..end as usize].iter().all(|&byte| byte == 0);
            assert!(zero, "{at}..{end} is said to be zero");
            holes += end - at;
        }
        at = end;
    }
    assert_eq!(at, bytes.len() as u64);
    assert!(holes > at / 2, "only {holes} bytes of holes were found in a sparse image");
}

fn mount_by_nbdfuse(engine: &str) {
    let test = "nbdfuse_mounts_the_export";
    if fs::File::options().read(true).write(true).open("/dev/fuse").is_err() {
        skip(test, "no access to /dev/fuse");
        return;
    }
    let scratch = Scratch::new();
    let server = Serve::new("memory:?size=16M").engine(engine).unix();
    let mount = scratch.path().join("mount");
    fs::create_dir(&mount).expect("make a directory");
    let file = mount.join("nbd");
    let mut fuse = std::process::Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "nbdfuse"])
        .arg(&file)
        .arg(server.uri())
        .spawn()
        .expect("nbdfuse");
    let mut ended = None;
    let mounted = eventually(|| {
        ended = fuse.try_wait().expect("our own child");
        file.exists() || ended.is_some()
    });
    if let Some(status) = ended {
        skip(test, &format!("nbdfuse cannot mount here ({status})"));
        return;
    }
    let unmount = || Run::new("fusermount3").arg("-u").arg(&mount).ok();
    let outcome = std::panic::catch_unwind(|| {
        assert!(mounted, "nbdfuse has no file");
        let data = sheave_tests::pattern(3 << 20, 7);
        let from = scratch.file("data");
        fs::write(&from, &data).expect("write a file");
        Run::new("dd")
            .arg(format!("if={from}"))
            .arg(format!("of={}", file.display()))
            .args("bs=256k seek=3 conv=notrunc,fsync")
            .ok();
        let image = fs::read(&file).expect("read the mounted file");
        assert_eq!(image.len(), 16 << 20);
        assert!(image[768 << 10..][..data.len()] == data, "bytes through nbdfuse");
    });
    unmount();
    fuse.wait().expect("our own child");
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// The directory of a libnbd that knows extended headers.
fn newer_libnbd(test: &str) -> Option<&'static Path> {
    static TOOLS: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let tools = TOOLS.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/libnbd-trixie");
        let output = Run::new(script).timeout(Duration::from_secs(300)).output();
        if output.status.success() {
            Ok(PathBuf::from(output.stdout.trim()))
        } else {
            Err(output.stderr.trim().replace('\n', "; "))
        }
    });
    match tools {
        Ok(tools) => Some(tools),
        Err(why) => {
            skip(test, &format!("no libnbd 1.18 or newer: {why}"));
            None
        }
    }
}
