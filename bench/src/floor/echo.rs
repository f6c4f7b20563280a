//! The echo floor: plain system calls, no volume. It takes requests and sends back as many bytes
//! as a server would have to, always the same ones.

use std::io::IoSlice;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use sheave_proto::wire::{command, header_len};
use sheave_proto::{ReplyStyle, Request, reply};

use super::{FloorArgs, RECEIVE_SIZE, accept, handshake};

/// The longest read that it answers.
const READ_LEN_MAX: usize = 32 << 20;
/// Pieces in one send: the kernel's limit.
const PIECES_MAX: usize = 1024;

/// Serves until it is killed.
///
/// # Errors
/// When it cannot listen.
pub(crate) fn serve(args: &FloorArgs) -> Result<()> {
    let (size, poll) = (args.size.0, args.poll());
    accept(args, move |mut socket| {
        handshake::serve(&mut socket, size)?;
        echo(&socket, poll)
    })
}

fn echo(socket: &UnixStream, poll: Duration) -> Result<()> {
    let mut data = Vec::new();
    let mut input = vec![0; RECEIVE_SIZE];
    let mut end = 0;
    // Bytes of a write's payload that are still to come, and are dropped.
    let mut skip = 0;
    let mut headers = Vec::new();
    let mut lens = Vec::new();
    loop {
        let count = receive(socket, &mut input[end..], poll)?;
        if count == 0 {
            return Ok(());
        }
        end += count;
        let mut at = 0;
        loop {
            let skipped = skip.min(end - at);
            at += skipped;
            skip -= skipped;
            let Some(header) = input[..end].get(at..at + header_len::REQUEST) else { break };
            let request = Request::decode(ReplyStyle::Simple, header)?;
            at += header_len::REQUEST;
            let len = usize::try_from(request.length)?;
            ensure!(len <= READ_LEN_MAX, "a request of {len} bytes");
            match request.command {
                command::DISC => return Ok(()),
                command::WRITE => skip = len,
                _ => {}
            }
            reply::simple(&mut headers, request.cookie, None);
            lens.push(if request.command == command::READ { len } else { 0 });
        }
        input.copy_within(at..end, 0);
        end -= at;
        let len_max = lens.iter().copied().max().unwrap_or(0);
        data.resize(len_max.max(data.len()), 0x5a);
        send_replies(socket, &headers, &lens, &data)?;
        headers.clear();
        lens.clear();
    }
}

fn receive(socket: &UnixStream, buf: &mut [u8], poll: Duration) -> Result<usize> {
    if !poll.is_zero() {
        let start = Instant::now();
        while start.elapsed() < poll {
            match rustix::net::recv(socket, &mut *buf, RecvFlags::DONTWAIT) {
                Err(Errno::WOULDBLOCK) => std::hint::spin_loop(),
                ended => return Ok(ended?.1),
            }
        }
    }
    Ok(rustix::net::recv(socket, buf, RecvFlags::empty())?.1)
}

/// Sends all replies with as few calls as the kernel allows.
fn send_replies(socket: &UnixStream, headers: &[u8], lens: &[usize], data: &[u8]) -> Result<()> {
    let mut pieces = Vec::with_capacity(lens.len() * 2);
    for (header, len) in headers.chunks_exact(header_len::SIMPLE_REPLY).zip(lens) {
        pieces.push(IoSlice::new(header));
        pieces.push(IoSlice::new(&data[..*len]));
    }
    let mut rest = &mut pieces[..];
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(PIECES_MAX)];
        let flags = SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(socket, now, &mut SendAncillaryBuffer::default(), flags)?;
        IoSlice::advance_slices(&mut rest, sent);
    }
    Ok(())
}
