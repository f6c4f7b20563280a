//! The handshake of a floor: one export, no encryption.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Result, bail, ensure};
use sheave_core::{BlockSizes, Capabilities, VolumeInfo};
use sheave_proto::{Export, HandshakeLimits, Next, ReplyStyle, ServerHandshake, TlsMode};

/// Takes a connection to its transmission phase, with simple replies.
///
/// # Errors
/// When the client goes away or wants another style of replies.
pub(crate) fn serve(socket: &mut UnixStream, size: u64) -> Result<()> {
    let exports = vec![Export {
        name: String::new(),
        description: String::new(),
        size,
        info: VolumeInfo {
            block: BlockSizes::default(),
            read_only: false,
            rotational: false,
            volatile: false,
            identity: None,
            can: Capabilities { flush: true, multi_conn: true, ..Capabilities::default() },
        },
        tls_only: false,
    }];
    let mut handshake = ServerHandshake::new(TlsMode::Off, HandshakeLimits::default());
    socket.write_all(&ServerHandshake::greeting())?;
    let mut input = [0; 4096];
    loop {
        let count = socket.read(&mut input)?;
        ensure!(count > 0, "the client closed the connection");
        let mut rest = &input[..count];
        while !rest.is_empty() {
            let step = handshake.step(rest, &exports);
            rest = &rest[step.consumed..];
            socket.write_all(&step.output)?;
            match step.next {
                Next::NeedMore => {}
                Next::Transmission(negotiated) => {
                    ensure!(negotiated.style == ReplyStyle::Simple, "simple replies only");
                    ensure!(rest.is_empty(), "a request before the handshake's end");
                    return Ok(());
                }
                Next::StartTls => bail!("no TLS"),
                Next::Close(reason) => return Err(reason.into()),
            }
        }
    }
}
