//! `sheave bench run` against servers that break the protocol: it ends, and says why.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use sheave_tests::{Run, Scratch, magic, opt, reply, sheave};

const SIZE: u64 = 1 << 20;
const REQUEST_LEN: usize = 28;

/// Chunk types and the flag of the last chunk.
const HOLE: u16 = 2;
const ERROR: u16 = 1 << 15 | 1;
const NOT_LAST: u16 = 0;
const LAST: u16 = 1;

#[test]
fn errors_without_end_are_an_error() {
    let told = told_of(|stream, cookie, _| {
        // An I/O error without words.
        let error = chunk(NOT_LAST, ERROR, cookie, &[0, 0, 0, 5, 0, 0]);
        loop {
            stream.write_all(&error)?;
        }
    });
    assert!(told.contains("too many errors"), "{told}");
}

#[test]
fn bytes_that_come_twice_or_never_are_an_error() {
    let twice = told_of(|stream, cookie, offset| {
        stream.write_all(&chunk(NOT_LAST, HOLE, cookie, &hole(offset, 2048)))?;
        stream.write_all(&chunk(LAST, HOLE, cookie, &hole(offset, 2048)))
    });
    assert!(twice.contains("arrived twice"), "{twice}");
    let never = told_of(|stream, cookie, offset| {
        stream.write_all(&chunk(LAST, HOLE, cookie, &hole(offset, 2048)))
    });
    assert!(never.contains("without all of its bytes"), "{never}");
}

/// What a load says of a server that answers its reads, of 4096 bytes, in this way.
#[track_caller]
fn told_of(answer: fn(&mut UnixStream, u64, u64) -> io::Result<()>) -> String {
    let scratch = Scratch::new();
    let socket = scratch.file("s");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        // It ends when the client has seen enough.
        let _ = serve(stream, answer);
    });
    let run = Run::new(sheave()).args("bench run --structured --seconds 1 --qd 4");
    let output = run.arg(format!("nbd+unix:///?socket={socket}"));
    let output = output.output();
    server.join().expect("the server");
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    output.stderr
}

fn serve(
    mut stream: UnixStream,
    answer: fn(&mut UnixStream, u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut greeting = magic::NBDMAGIC.to_be_bytes().to_vec();
    greeting.extend(magic::IHAVEOPT.to_be_bytes());
    greeting.extend(3_u16.to_be_bytes());
    stream.write_all(&greeting)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let option = number(&header[8..12]) as u32;
        stream.read_exact(&mut vec![0; number(&header[12..]) as usize])?;
        if option != opt::GO {
            stream.write_all(&option_reply(option, reply::ACK, &[]))?;
            continue;
        }
        // The export: its size, and that it has flags.
        let mut export = vec![0, 0];
        export.extend(SIZE.to_be_bytes());
        export.extend(1_u16.to_be_bytes());
        stream.write_all(&option_reply(option, reply::INFO, &export))?;
        stream.write_all(&option_reply(option, reply::ACK, &[]))?;
        break;
    }
    loop {
        let mut request = [0; REQUEST_LEN];
        stream.read_exact(&mut request)?;
        answer(&mut stream, number(&request[8..16]), number(&request[16..24]))?;
    }
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = magic::OPTION_REPLY.to_be_bytes().to_vec();
    for field in [option, kind, data.len() as u32] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = magic::STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn hole(at: u64, len: u32) -> Vec<u8> {
    [&at.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
