//! File I/O, on the ring and by its plain twin.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use sheave_core::{Allocate, Buf, IoRequest, Segment};
use sheave_ring::{By, Event, Ring, plain};
use tempfile::NamedTempFile;

use crate::support::{name, next, pattern, pieces, ring, small};

/// Carries a request out and gives it back.
type CarryOut<'a> = &'a mut dyn FnMut(IoRequest) -> (io::Result<usize>, IoRequest);

#[test]
fn on_the_ring() {
    let Some(mut ring) = ring(small()) else { return };
    check(&mut |request| on_ring(&mut ring, request));
}

#[test]
fn by_plain_calls() {
    check(&mut |request| (plain::carry_out(&request), request));
}

#[test]
fn copies_of_a_device_are_whole_or_fail() {
    let file = tempfile::tempfile().unwrap();
    let bytes = pattern(9000);
    let mut payload = pieces(&[1, 8999]);
    payload.copy_in(0, &bytes);
    // More zeroes, and more pieces, than one call takes.
    payload.push(Segment::Zero(100 << 20));
    let many = pieces(&[1; 1500]);
    many.copy_in(0, &bytes[..1500]);
    many.segments().iter().for_each(|segment| payload.push(segment.clone()));
    plain::copy_to_device(file.as_fd(), 3, &payload).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 3 + payload.len() as u64);

    let into = pieces(&[4000, 5000]);
    plain::copy_from_device(file.as_fd(), 3, &into).unwrap();
    assert_eq!(into.to_vec(), bytes);
    let into = pieces(&[1; 1600]);
    let end = 3 + payload.len() as u64;
    plain::copy_from_device(file.as_fd(), end - 1600, &into).unwrap();
    assert_eq!(into.to_vec(), [&[0; 100], &bytes[..1500]].concat());
    let error = plain::copy_from_device(file.as_fd(), end - 1599, &into).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

fn on_ring(ring: &mut Ring, request: IoRequest) -> (io::Result<usize>, IoRequest) {
    ring.start(request, (5, 77), 0, By::Caller).expect("room");
    match next(ring) {
        Event::File { user: (5, 77), result, request } => (result, request),
        other => panic!("{}", name(&other)),
    }
}

fn check(carry_out: CarryOut<'_>) {
    let image = NamedTempFile::new_in("/var/tmp").unwrap();
    let file = Arc::new(image.reopen().unwrap());
    writes_and_reads(&file, carry_out);
    allocates(&file, carry_out);
    reports_errors(&image, carry_out);
}

fn writes_and_reads(file: &Arc<File>, carry_out: CarryOut<'_>) {
    let bytes = pattern(20_000);
    for (at, lens, dsync) in [(0, &[20_000][..], false), (5, &[1, 9000, 10_999], true)] {
        let from = pieces(lens);
        from.copy_in(0, &bytes);
        let write = IoRequest::Write { file: Arc::clone(file), at, from, dsync };
        assert_eq!(carry_out(write).0.unwrap(), 20_000);
        let into = Buf::zeroed(20_100).slice(50, 20_000);
        let read = IoRequest::Read { file: Arc::clone(file), at, into: into.clone() };
        let (result, request) = carry_out(read);
        assert_eq!(result.unwrap(), 20_000);
        assert_eq!(into.to_vec(), bytes);
        assert!(matches!(request, IoRequest::Read { into: back, .. } if back.is_same(&into)));
    }
    // Short at the end of the file, nothing beyond it.
    for (at, want) in [(20_000, 5), (20_005, 0), (1 << 40, 0)] {
        let read = IoRequest::Read { file: Arc::clone(file), at, into: Buf::zeroed(100) };
        assert_eq!(carry_out(read).0.unwrap(), want);
    }
    // More pieces than one call takes are written in part.
    let from = pieces(&[3; 2000]);
    from.copy_in(0, &bytes[..6000]);
    let write = IoRequest::Write { file: Arc::clone(file), at: 0, from, dsync: false };
    assert_eq!(carry_out(write).0.unwrap(), 3 * 1024);
    let sync = IoRequest::Sync { file: Arc::clone(file) };
    assert_eq!(carry_out(sync).0.unwrap(), 0);
}

fn allocates(file: &Arc<File>, carry_out: CarryOut<'_>) {
    for mode in [Allocate::PunchHole, Allocate::ZeroRange] {
        let from = pieces(&[20_000]);
        from.copy_in(0, &[0xff; 20_000]);
        let write = IoRequest::Write { file: Arc::clone(file), at: 0, from, dsync: false };
        carry_out(write).0.unwrap();
        let allocate = IoRequest::Allocate { file: Arc::clone(file), mode, at: 100, len: 9000 };
        match carry_out(allocate).0 {
            Ok(_) => {}
            // Not every file system can.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => continue,
            Err(error) => panic!("{error}"),
        }
        let into = Buf::zeroed(20_000);
        let read = IoRequest::Read { file: Arc::clone(file), at: 0, into: into.clone() };
        carry_out(read).0.unwrap();
        let bytes = into.to_vec();
        assert!(bytes[..100].iter().chain(&bytes[9100..]).all(|byte| *byte == 0xff), "{mode:?}");
        assert!(bytes[100..9100].iter().all(|byte| *byte == 0), "{mode:?}");
    }
}

fn reports_errors(image: &NamedTempFile, carry_out: CarryOut<'_>) {
    let read_only = Arc::new(File::open(image.path()).unwrap());
    let file = Arc::clone(&read_only);
    let from = pieces(&[10]);
    let write = IoRequest::Write { file, at: 0, from, dsync: false };
    assert_eq!(carry_out(write).0.unwrap_err().raw_os_error(), Some(libc::EBADF));
    let mode = Allocate::PunchHole;
    let allocate = IoRequest::Allocate { file: Arc::clone(&read_only), mode, at: 0, len: 1 };
    assert_eq!(carry_out(allocate).0.unwrap_err().raw_os_error(), Some(libc::EBADF));
    let directory = Arc::new(File::open("/").unwrap());
    let read = IoRequest::Read { file: directory, at: 0, into: Buf::zeroed(1) };
    assert_eq!(carry_out(read).0.unwrap_err().raw_os_error(), Some(libc::EISDIR));
    // An offset beyond what files can have.
    let file = Arc::new(image.reopen().unwrap());
    let from = pieces(&[10]);
    let write = IoRequest::Write { file, at: u64::MAX - 5, from, dsync: false };
    assert!(carry_out(write).0.is_err());
    assert_eq!(image.as_file().metadata().unwrap().len(), 20_005, "nothing was written");
}
