//! The client, with servers that lie, die and stall.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use sheave_core::{
    Buf, ByteRange, Capabilities, Error, ErrorKind, Extent, Op, Outcome, Reply, Volume, VolumeInfo,
};
use sheave_nbd::Remote;
use sheave_proto::reply::{
    ReplyTo, data_chunk, error_chunk, failure, hole_chunk, none_chunk, simple, success,
};
use sheave_proto::wire::command;
use sheave_proto::{Export, HandshakeLimits, Next, Request, ServerHandshake, TlsMode};
use sheave_shard::{Blocking, EngineChoice};
use tempfile::TempDir;

use crate::support::{Setup, pattern};

const SIZE: u64 = 1 << 20;

/// What the server answers to a request; an empty answer closes the connection.
type Script = fn(ReplyTo, &Request) -> Vec<u8>;

/// A server for as many connections as there are, which does what its script says.
struct Scripted {
    uri: String,
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Scripted {
    fn new(script: Script) -> Self {
        Self::start(script, false)
    }

    /// Closes the connection after the first answer.
    fn closing(script: Script) -> Self {
        Self::start(script, true)
    }

    fn start(script: Script, closing: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serve(stream.unwrap(), script, closing).is_none() {
                    return;
                }
            }
        });
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Self { uri, socket, thread: Some(thread), _dir: dir }
    }

    fn run(&self, op: Op) -> Outcome {
        Blocking::open(&self.volume())?.run(op)
    }

    fn volume(&self) -> Remote {
        Remote::open(&self.uri).unwrap()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        // A connection that says nothing is its end.
        drop(UnixStream::connect(&self.socket));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// One connection. `None` if the client said nothing at all.
fn serve(mut stream: UnixStream, script: Script, closing: bool) -> Option<()> {
    let can =
        Capabilities { flush: true, write_zeroes: true, block_status: true, ..Default::default() };
    let info = VolumeInfo {
        block: Default::default(),
        read_only: false,
        rotational: false,
        volatile: false,
        identity: None,
        can,
    };
    let exports = vec![Export {
        name: "e".to_owned(),
        description: String::new(),
        size: SIZE,
        info,
        tls_only: false,
    }];
    let mut handshake = ServerHandshake::new(TlsMode::Off, HandshakeLimits::default());
    stream.write_all(&ServerHandshake::greeting()).ok()?;
    let mut input = [0; 1];
    stream.read_exact(&mut input).ok()?;
    let negotiated = loop {
        let step = handshake.step(&input, &exports);
        stream.write_all(&step.output).ok()?;
        match step.next {
            Next::NeedMore => {}
            Next::Transmission(negotiated) => break negotiated,
            _ => return Some(()),
        }
        if stream.read_exact(&mut input).is_err() {
            return Some(());
        }
    };
    let mut header = vec![0; Request::header_len(negotiated.style)];
    while stream.read_exact(&mut header).is_ok() {
        let request = Request::decode(negotiated.style, &header).unwrap();
        let mut payload = vec![0; request.payload_len(negotiated.style) as usize];
        if stream.read_exact(&mut payload).is_err() || request.command == command::DISC {
            break;
        }
        let answer = script(ReplyTo::new(negotiated.style, &request), &request);
        if answer.is_empty() || stream.write_all(&answer).is_err() || closing {
            break;
        }
    }
    Some(())
}

fn range() -> ByteRange {
    ByteRange::within(4096, 8192, SIZE).unwrap()
}

fn read() -> Op {
    Op::Read { range: range(), into: None }
}

fn status() -> Op {
    Op::BlockStatus { range: range(), extents_max: 100 }
}

fn error(outcome: Outcome) -> Error {
    outcome.map(|_| ()).unwrap_err()
}

/// Bytes that a function appends.
fn bytes(put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    out
}

fn data(out: &mut Vec<u8>, to: ReplyTo, at: u64, len: usize, done: bool) {
    data_chunk(out, to, at, len as u32, done);
    out.resize(out.len() + len, 7);
}

/// A block status chunk of the extended kind.
fn status_chunk(out: &mut Vec<u8>, to: ReplyTo, context: u32, extents: &[(u64, u64)], done: bool) {
    let before = out.len();
    none_chunk(out, to);
    let len = 8 + 16 * extents.len() as u64;
    out[before + 4..before + 6].copy_from_slice(&u16::from(done).to_be_bytes());
    out[before + 6..before + 8].copy_from_slice(&6_u16.to_be_bytes());
    out[before + 24..before + 32].copy_from_slice(&len.to_be_bytes());
    out.extend(context.to_be_bytes());
    out.extend((extents.len() as u32).to_be_bytes());
    for (len, status) in extents {
        out.extend(len.to_be_bytes());
        out.extend(status.to_be_bytes());
    }
}

#[test]
fn an_honest_answer_in_pieces() {
    let server = Scripted::new(|to, request| {
        bytes(|out| match request.command {
            command::READ => {
                data(out, to, 8192, 4096, false);
                hole_chunk(out, to, 4096, 4000, false);
                data(out, to, 8096, 96, false);
                none_chunk(out, to);
            }
            command::BLOCK_STATUS => {
                status_chunk(out, to, 1, &[(4096, 0), (1 << 40, 3), (5, 0)], true);
            }
            _ => success(out, to),
        })
    });
    let Ok(Reply::Data(data)) = server.run(read()) else { panic!("data") };
    assert_eq!(data.to_vec(), [vec![0; 4000], vec![7; 4192]].concat());
    let Ok(Reply::Extents(extents)) = server.run(status()) else { panic!("extents") };
    let hole = Extent { len: 4096, hole: true, zero: true };
    assert_eq!(extents, [Extent { len: 4096, hole: false, zero: false }, hole]);
    assert!(matches!(server.run(Op::Flush), Ok(Reply::Done)));
}

#[test]
fn an_error_is_the_servers_and_the_connection_goes_on() {
    let server = Scripted::new(|to, request| {
        bytes(|out| match (request.command, request.cookie) {
            (command::READ, 1) => {
                data(out, to, 4096, 100, false);
                error_chunk(out, to, sheave_core::NbdErrno::NoSpc, "first", false);
                failure(out, to, sheave_core::NbdErrno::NoMem, "then this");
            }
            (command::READ, _) => data(out, to, 4096, 8192, true),
            _ => failure(out, to, sheave_core::NbdErrno::NotSup, ""),
        })
    });
    let mut blocking = Blocking::open(&server.volume()).unwrap();
    let no_memory = error(blocking.run(read()));
    assert_eq!(no_memory.kind(), ErrorKind::NoMemory);
    assert!(no_memory.to_string().starts_with("read: nbd+unix://"), "{no_memory}");
    assert!(no_memory.to_string().ends_with("then this"), "{no_memory}");
    assert!(blocking.run(read()).is_ok());
    assert_eq!(error(blocking.run(Op::Flush)).kind(), ErrorKind::Unsupported);
}

#[test]
fn lies_are_errors_and_the_end_of_the_connection() {
    let lies: [Script; 13] = [
        // Reads: nothing, too little, something twice, something else, more than asked for.
        |to, _| bytes(|out| none_chunk(out, to)),
        |to, _| bytes(|out| data(out, to, 4096, 8191, true)),
        |to, _| bytes(|out| data(out, to, 4097, 8191, true)),
        |to, _| {
            bytes(|out| {
                hole_chunk(out, to, 4096, 8192, false);
                data(out, to, 5000, 1, true);
            })
        },
        |to, _| bytes(|out| data(out, to, 4096, 8193, true)),
        |to, _| bytes(|out| hole_chunk(out, to, 0, 4096, true)),
        |to, _| bytes(|out| data(out, to, u64::MAX, 5, true)),
        |to, _| bytes(|out| status_chunk(out, to, 1, &[(8192, 0)], true)),
        // Whatever: another's reply, a simple one, noise, an end in the middle, none at all.
        |to, _| bytes(|out| none_chunk(out, ReplyTo { cookie: 77, ..to })),
        |to, _| bytes(|out| simple(out, to.cookie, None)),
        |_, _| vec![0x55; 1000],
        |to, _| bytes(|out| data(out, to, 4096, 8192, true))[..500].to_vec(),
        |_, _| Vec::new(),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let server = Scripted::closing(lie);
        let mut blocking = Blocking::open(&server.volume()).unwrap();
        let first = error(blocking.run(read()));
        assert!(matches!(first.kind(), ErrorKind::Io | ErrorKind::Shutdown), "{number}: {first}");
        let second = error(blocking.run(read()));
        assert!(first.to_string().starts_with("read: nbd+unix://"), "{number}: {first}");
        assert!(second.to_string().starts_with("read: nbd+unix://"), "{number}: {second}");
        assert!(second.to_string().contains("of no use"), "{number}: {second}");
    }
}

#[test]
fn lies_about_the_block_status() {
    let lies: [Script; 5] = [
        |to, _| bytes(|out| none_chunk(out, to)),
        |to, _| bytes(|out| status_chunk(out, to, 9, &[(8192, 0)], true)),
        |to, _| bytes(|out| status_chunk(out, to, 1, &[], true)),
        |to, _| bytes(|out| status_chunk(out, to, 1, &[(0, 0)], true)),
        |to, _| {
            bytes(|out| {
                status_chunk(out, to, 1, &[(4096, 0)], false);
                status_chunk(out, to, 1, &[(4096, 0)], true);
            })
        },
    ];
    for lie in lies {
        assert_eq!(error(Scripted::new(lie).run(status())).kind(), ErrorKind::Io);
    }
}

#[test]
fn a_reply_without_end_is_ended() {
    let server = Scripted::new(|to, _| {
        bytes(|out| {
            (0..1000).for_each(|_| error_chunk(out, to, sheave_core::NbdErrno::Io, "", false));
        })
    });
    let error = error(server.run(Op::Flush));
    assert!(error.to_string().contains("too many errors"), "{error}");
}

#[test]
fn all_ops_reach_our_own_server() {
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        let server = Setup::new(engine, "memory:?size=1M").start();
        let remote =
            Remote::open(&format!("nbd+unix:///disk?socket={}", server.socket.display())).unwrap();
        assert_eq!(remote.size(), SIZE);
        // The second backend is a connection of its own.
        let mut first = Blocking::open(&remote).unwrap();
        let mut second = Blocking::open(&remote).unwrap();
        let range = ByteRange::within(100, 300_000, SIZE).unwrap();
        let written = pattern(1, 300_000);
        let data = Buf::from_bytes(&written).into();
        first.run(Op::Write { range, data, fua: true }).unwrap();
        first.run(Op::Flush).unwrap();
        let Ok(Reply::Data(back)) = second.run(Op::Read { range, into: None }) else {
            panic!("data")
        };
        assert!(back.to_vec() == written);
        let zeroes = Op::WriteZeroes { range, fua: true, no_hole: false, fast: true };
        second.run(zeroes).unwrap();
        second.run(Op::Trim { range, fua: false }).unwrap();
        second.run(Op::Cache { range }).unwrap();
        let Ok(Reply::Data(back)) = first.run(Op::Read { range, into: None }) else {
            panic!("data")
        };
        assert!(back.to_vec().iter().all(|byte| *byte == 0));
        let Ok(Reply::Extents(extents)) = first.run(Op::BlockStatus { range, extents_max: 9 })
        else {
            panic!("extents")
        };
        assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), 300_000);
    }
}

#[test]
fn who_does_not_speak_nbd_is_found_out() {
    for greeting in [&b""[..], b"HTTP/1.1 400 Bad Request\r\n\r\n", &[0; 100], b"NBDMAGIC"] {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(greeting);
        });
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let error = Remote::open(&uri).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        thread.join().unwrap();
    }
}
