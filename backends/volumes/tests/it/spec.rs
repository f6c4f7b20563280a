//! The meaning of VOLUME texts, and the errors for wrong ones.

use sheave_core::{ErrorKind, Op};
use tempfile::TempDir;

use sheave_conformance::ops::{bytes, driver, read, write};
use sheave_volumes::{OpenOptions, VolumeSpec, open};

fn error(text: &str) -> (ErrorKind, String) {
    let error = open(text, &OpenOptions::default()).err().unwrap_or_else(|| panic!("{text} opens"));
    (error.kind(), error.to_string())
}

#[test]
fn wrong_volumes_say_what_is_wrong_and_what_to_do() {
    use ErrorKind::{Invalid, Io, NotFound, TooLarge};
    let cases = [
        ("", Invalid, "path is missing"),
        ("?size=1G", Invalid, "path is missing"),
        ("memory:", Invalid, "add ?size=1G"),
        ("memory:?size=1X", Invalid, "size: \"1X\" is not a size"),
        ("memory:?size=1G&size=2G", Invalid, "more than once"),
        ("memory:?size=2P", TooLarge, "the most is 1P"),
        ("memory:8?size=1G", Invalid, "before ?size="),
        ("memory:?sice=1G&size=1G", Invalid, "unknown parameter \"sice\"; known here: size,"),
        ("memory:?siz=1G", Invalid, "unknown parameter \"siz\"; known here: size,"),
        ("null:?read-only&siz=1G", Invalid, "unknown parameter \"siz\""),
        ("null:?read-only", Invalid, "add ?size=1G"),
        ("/what?.img", Invalid, "unknown parameter \".img\""),
        ("/what?.img", Invalid, "written file:///…%3F…"),
        ("memory:?size=1G&direct=true", Invalid, "unknown parameter \"direct\""),
        ("null:?size=8E", Invalid, "the most is"),
        ("null:?size=1&read-only=maybe", Invalid, "write true or false"),
        ("null:?size=1&limit-bps=x", Invalid, "limit-bps: \"x\" is not a size"),
        ("null:?size=1&limit-bps=0", Invalid, "limit-bps must be above 0"),
        ("null:?size=1&limit-iops=x", Invalid, "limit-iops=x"),
        ("null:?size=1&fault=write", Invalid, "does nothing"),
        ("null:?size=1&fault-seed=-1", Invalid, "fault-seed"),
        ("file:a.img", Invalid, "file:///images/a.img"),
        ("file://host/a.img", Invalid, "file:///images/a.img"),
        ("file:///a%zz", Invalid, "% must begin"),
        ("file:///a%00b", Invalid, "zero byte"),
        ("/no/such/file", NotFound, "open: /no/such/file: No such file"),
        ("/proc", Invalid, "regular file or a block device"),
        ("/dev/null", Invalid, "regular file or a block device"),
        ("foo:bar.img", Invalid, "put ./ in front"),
        ("nbd+unix:///e", Invalid, "the parameter socket is missing"),
        ("nbd+unix:///e?socket=/no/such/socket", Io, "is the server running"),
        ("nbd://host:0x/", Invalid, "a bad host or port"),
        ("nbds://host/e?tls-type=x", Invalid, "a bad value of the parameter tls-type"),
        ("nbd://host/e?connections=99", Invalid, "the most is"),
        ("nbd://host/e?reconnect-timeout=x", Invalid, "write seconds"),
        ("nbd://host/e?size=1M", Invalid, "unknown parameter \"size\""),
        ("dir:///no/store/name?cache-dir=/nowhere", NotFound, "there is no volume; make it with"),
        ("dir://store/name", Invalid, "dir:///store/name"),
        ("dir:///", Invalid, "dir:///store/name"),
        ("dir:///a?size=1G", Invalid, "unknown parameter \"size\""),
    ];
    for (text, kind, want) in cases {
        let (got, message) = error(text);
        assert_eq!(got, kind, "{text}: {message}");
        assert!(message.contains(want), "{text}: {message}");
    }
}

#[cfg(not(feature = "s3"))]
#[test]
fn a_program_without_buckets_says_so() {
    let (kind, message) = error("s3://bucket/name");
    assert_eq!(kind, ErrorKind::Unsupported, "{message}");
    assert!(message.contains("feature s3"), "{message}");
}

#[cfg(feature = "s3")]
#[test]
fn bad_places_in_buckets_are_refused() {
    let long = format!("s3://bucket/{}", "x".repeat(901));
    let cases = [
        ("s3:", "s3://bucket/prefix/name"),
        ("s3://bucket", "s3://bucket/prefix/name"),
        ("s3://b/name", "at least 3"),
        ("s3://bu:cket/name", "at least 3"),
        ("s3://disks--use1-az4--x-s3/name", "directory buckets"),
        ("s3://bucket/", "no empty part"),
        ("s3://bucket//name", "no empty part"),
        ("s3://bucket/name/", "no empty part"),
        ("s3://bucket/a/../name", "no empty part"),
        ("s3://bucket/a%0Ab", "printable"),
        ("s3://bucket/%ff", "no UTF-8"),
        (&long, "900 bytes"),
        ("s3://bucket/a/root", "cannot be named"),
        ("s3://bucket/name?endpoint=localhost:9000", "endpoint= is a URL"),
        ("s3://bucket/name?endpoint=http://", "endpoint= is a URL"),
        ("s3://bucket/name?endpoint=http://user:word@host", "endpoint= is a URL"),
        ("s3://bucket/name?fencing=some", "fencing= is probe or none"),
        ("s3://bucket/name?path-style=maybe", "write true or false"),
        ("s3://bucket/name?size=1G", "unknown parameter \"size\""),
    ];
    for (text, want) in cases {
        let (kind, message) = error(text);
        assert_eq!(kind, ErrorKind::Invalid, "{text}: {message}");
        assert!(message.contains(want), "{text}: {message}");
    }
}

#[cfg(feature = "s3")]
#[test]
fn a_place_in_a_bucket_is_the_same_under_any_spelling() {
    let spec = |text: &str| text.parse::<VolumeSpec>().unwrap();
    let volume = spec("s3://bucket/a%20b/c?endpoint=http://host:9000&region=x");
    assert_eq!(volume.name(), "c");
    assert!(volume.is_same_place(&spec("s3://bucket/a b/c?endpoint=http://host:9000/")));
    assert!(!volume.is_same_place(&spec("s3://bucket/a b/c")), "that is another store");
    assert!(!volume.is_same_place(&spec("s3://bucket/a b/d?endpoint=http://host:9000")));
    let named = volume.object_volume().unwrap().unwrap().name;
    assert_eq!(named, "s3://bucket/a%20b/c?endpoint=http://host:9000");
}

#[test]
fn names_and_sizes() {
    let spec = |text: &str| text.parse::<VolumeSpec>().unwrap();
    assert_eq!(spec("memory:?size=1").name(), "memory");
    assert_eq!(spec("null:?size=1&read-only").name(), "null");
    let read_only = spec("null:?size=1&read-only").open(&OpenOptions::default()).unwrap();
    assert!(read_only.info().read_only);
    assert_eq!(spec("file:///images/a%20b.img?direct").name(), "a b.img");
    assert_eq!(spec("file:/images/a.img").name(), "a.img");
    assert_eq!(spec("./images/x:y.img?lock=false").name(), "x:y.img");
    let volume = open("null:?size=1T", &OpenOptions::default()).unwrap();
    assert_eq!(volume.size(), 1 << 40);
    assert_eq!(open("memory:?size=0", &OpenOptions::default()).unwrap().size(), 0);
}

#[test]
fn a_bare_path_is_taken_as_written_and_a_url_is_decoded() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("a%20b.img"), b"escaped").unwrap();
    std::fs::write(dir.path().join("a b.img"), b"plain").unwrap();
    let dir = dir.path().display();
    let first = |text: &str| {
        let volume = open(text, &OpenOptions::default()).unwrap();
        bytes(driver(&*volume).run_one(read(0, 5)))
    };
    assert_eq!(first(&format!("{dir}/a%20b.img")), b"escap");
    assert_eq!(first(&format!("file://{dir}/a%20b.img")), b"plain");
    assert_eq!(first(&format!("file://localhost{dir}/a%20b.img?read-only=yes")), b"plain");
}

#[test]
fn read_only_comes_from_text_or_options_and_lies_outside_faults() {
    let text = "memory:?size=1M&fault=write:error=EIO&fault=read:error=EIO:after=1";
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    for volume in [
        open(text, &options).unwrap(),
        open(&format!("{text}&read-only=true"), &OpenOptions::default()).unwrap(),
    ] {
        assert!(volume.info().read_only);
        assert!(!volume.info().can.write_zeroes && !volume.info().can.fast_zero);
        let mut driver = driver(&*volume);
        let kind = |outcome: sheave_core::Outcome| outcome.unwrap_err().kind();
        assert_eq!(kind(driver.run_one(write(0, b"x"))), ErrorKind::Permission);
        assert!(driver.run_one(read(0, 1)).is_ok(), "the first read is spared");
        assert_eq!(kind(driver.run_one(read(0, 1))), ErrorKind::Io);
        assert!(driver.run_one(Op::Flush).is_ok());
    }
}

#[test]
fn the_block_of_an_image_is_512_bytes_or_as_it_is_said() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let path = dir.path().join("a.img");
    let open_with = |parameters: &str| {
        open(&format!("{}?{parameters}", path.display()), &OpenOptions::default())
    };
    std::fs::write(&path, vec![0; 40_960]).unwrap();
    for direct in ["direct=false", "direct=true"] {
        assert_eq!(
            open_with(direct).unwrap().info().block.logical,
            512,
            "whatever the way to it takes"
        );
        for block in [512, 1024, 2048, 4096] {
            let volume = open_with(&format!("{direct}&block={block}")).unwrap();
            let sizes = volume.info().block;
            assert_eq!(sizes.logical, block);
            assert!(sizes.preferred >= block);
            // It grows by whole blocks.
            std::fs::File::options().write(true).open(&path).unwrap().set_len(53_000).unwrap();
            let unit =
                u64::from(block.max(if direct.ends_with("true") { sizes.minimum } else { 1 }));
            assert_eq!(volume.grow().unwrap(), 53_000 - 53_000 % unit);
            drop(volume);
            std::fs::File::options().write(true).open(&path).unwrap().set_len(40_960).unwrap();
        }
    }
    assert_eq!(open_with("block=4K").unwrap().info().block.logical, 4096);
    std::fs::write(&path, vec![0; 4097]).unwrap();
    let error = open_with("block=4096").err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("truncate -s %4096"), "{error}");
    for wrong in ["0", "256", "8192", "1000", "x"] {
        assert!(open_with(&format!("block={wrong}")).is_err(), "{wrong}");
    }
    assert!(open_with("format=qcow2").err().expect("refused").to_string().contains("qemu-nbd"));
    drop(open_with("format=raw").unwrap());
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let url = format!("{}?block=4096", path.display());
    let spec: VolumeSpec = url.parse().unwrap();
    assert_eq!(spec.resize(Some(10_000)).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(spec.resize(Some(8192)).unwrap(), 8192);
    drop(open_with("block=4096").unwrap());
}

#[test]
fn only_the_operator_may_name_a_program() {
    let text = "nbd+exec:?command=nbdkit%20null%201M&read-only";
    let (kind, message) = error(text);
    assert_eq!(kind, ErrorKind::Permission);
    assert!(message.contains("not by a request"), "{message}");
    assert_eq!(VolumeSpec::of_operator(text).unwrap().name(), "nbdkit");
    let named = VolumeSpec::of_operator("nbd+exec:///disk%201?command=/usr/sbin/nbdkit%20null");
    assert_eq!(named.unwrap().name(), "disk 1");
    for (text, want) in [
        ("nbd+exec:", "add ?command="),
        ("nbd+exec:?command=%20", "add ?command="),
        ("nbd+exec:?command=a&command=b", "more than once"),
        ("nbd+exec:?command=a%00b", "zero byte"),
        ("nbd+exec://host/?command=a", "no host belongs here"),
        ("nbd+exec:?command=a&directory=", "directory= takes one path"),
        ("nbd+exec:?command=a&socket=/s", "unknown parameter \"socket\""),
    ] {
        let error = VolumeSpec::of_operator(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(want), "{error}");
    }
}
