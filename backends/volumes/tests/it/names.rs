//! One volume has one name, wherever it is written.

use std::env;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use sheave_volumes::{VolumeSpec, file_url, volume_text};

fn spec(text: &str) -> VolumeSpec {
    VolumeSpec::of_operator(text).unwrap()
}

fn absolute(text: &str) -> String {
    spec(text).absolute().unwrap()
}

#[test]
fn a_path_has_one_name_and_a_url_is_left_alone() {
    let here = env::current_dir().unwrap();
    let whole = |rest: &str| format!("{}/{rest}", here.display());
    assert_eq!(absolute("a.img"), whole("a.img"));
    assert_eq!(absolute("./b/.//a.img?direct=true"), whole("b/a.img?direct=true"));
    assert_eq!(absolute("/x//a.img"), "/x/a.img");
    for url in ["file:///x//a.img?lock=false", "file:///x/a%3F.img", "memory:?size=1G"] {
        assert_eq!(absolute(url), url);
    }
}

#[test]
fn a_file_whose_name_is_no_text_has_one_name_too() {
    let volume = |bytes: &[u8]| absolute(&volume_text(OsStr::from_bytes(bytes)).unwrap());
    let name = "file:///x/caf%E9%0A.img?lock=false";
    for other in [
        &b"/x//./caf\xe9\n.img?lock=false"[..],
        b"file:///x/caf%e9%0a.img?lock=false",
        b"file://localhost/x/c%61f\xe9\n.img?lock=false",
        name.as_bytes(),
    ] {
        assert_eq!(volume(other), name);
    }
    let here = file_url(&env::current_dir().unwrap());
    assert_eq!(volume(b"./caf\xe9"), format!("{here}/caf%E9"));
}

#[test]
fn paths_in_parameters_become_absolute() {
    let here = env::current_dir().unwrap();
    for url in [
        "nbd://host/disk",
        "nbds://host/disk?tls-certificates=/etc/pki/nbd&read-only=true",
        "nbd+unix:///disk?socket=/run/a%26b",
        "nbd+unix:///?socket=%00abstract",
    ] {
        assert_eq!(absolute(url), url);
    }
    assert_eq!(
        absolute("nbds+unix:///d?read-only&socket=a%26b%E9&tls-certificates=pki"),
        format!(
            "nbds+unix:///d?read-only&socket={0}/a%26b%E9&tls-certificates={0}/pki",
            here.display()
        )
    );
}

#[test]
fn a_command_keeps_its_directory() {
    let here = env::current_dir().unwrap();
    assert_eq!(
        absolute("nbd+exec:?command=qemu-nbd%20disk.qcow2&read-only"),
        format!("nbd+exec:?command=qemu-nbd%20disk.qcow2&read-only&directory={}", here.display())
    );
    let whole = "nbd+exec:/x?command=a&directory=/images";
    assert_eq!(absolute(whole), whole);
    assert_eq!(
        absolute("nbd+exec:?command=a&directory=images"),
        format!("nbd+exec:?command=a&directory={}/images", here.display())
    );
    assert!(spec(whole).is_same_place(&spec("nbd+exec:///x?directory=/images&command=a")));
    assert!(!spec(whole).is_same_place(&spec("nbd+exec:/x?command=a&directory=/other")));
}

#[test]
fn a_place_is_known_under_other_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    std::fs::write(&path, "x").unwrap();
    std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
    let path = path.to_str().unwrap();
    let link = dir.path().join("link");
    let same = |one: &str, other: &str| spec(one).is_same_place(&spec(other));
    assert!(same(path, &format!("{}?read-only", link.display())));
    assert!(same("nbd://host/disk", "nbd://host:10809/disk?read-only=true"));
    assert!(!same("nbd://host/disk", "nbd://host/other"));
    assert!(!same("nbd://host/disk", "nbd+unix:///disk?socket=/run/host"));
    assert!(!same(path, "/no/such/file"));
    assert!(!same("/no/such/file", "/no/such/file"));
    assert!(!same("memory:?size=1M", "memory:?size=1M"), "each is one of its own");
}
