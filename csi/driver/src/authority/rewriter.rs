//! The bytes of a client of HTTP/2, with another authority. Bytes in, bytes out.

use std::borrow::Cow;
use std::io;

use loona_hpack::Decoder;

/// What a client sends first (RFC 9113, 3.4).
const PREFACE_LEN: usize = 24;
const FRAME_HEADER_LEN: usize = 9;
/// The longest frame that a server takes unless it says otherwise (RFC 9113, 4.2).
const FRAME_LEN_MAX: usize = 16 << 10;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
const PRIORITY_LEN: usize = 5;

/// Of a header block, before and after it is decoded: kubelet sends some 300 bytes.
const BLOCK_LEN_MAX: usize = 64 << 10;
/// What a client may keep in the table of its headers unless the server says otherwise.
const TABLE_LEN: usize = 4096;
const AUTHORITY: &[u8] = b":authority";
const PLAIN: &[u8] = b"localhost";

/// Rewrites what a client sends, however it is divided.
pub(super) struct Rewriter {
    state: State,
    decoder: Decoder<'static>,
    /// Of a block that goes on in the next frame: its stream, its flags, its bytes.
    begun: Option<(u32, u8, Vec<u8>)>,
}

enum State {
    /// So many bytes pass.
    Pass(usize),
    /// The start of a frame's header.
    Header(Vec<u8>),
    /// A frame with a part of a header block.
    Block { frame: Frame, bytes: Vec<u8> },
}

#[derive(Clone, Copy)]
struct Frame {
    len: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Rewriter {
    pub(super) fn new() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE_LEN);
        Self { state: State::Pass(PREFACE_LEN), decoder, begun: None }
    }

    /// Takes what a client has sent.
    ///
    /// # Errors
    /// When it breaks the protocol: the connection cannot go on.
    pub(super) fn push(&mut self, mut input: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
        loop {
            match &mut self.state {
                State::Pass(0) => self.state = State::Header(Vec::new()),
                State::Pass(left) => {
                    if input.is_empty() {
                        return Ok(());
                    }
                    let bytes = take(&mut input, *left);
                    output.extend(bytes);
                    *left -= bytes.len();
                }
                State::Header(header) => {
                    header.extend(take(&mut input, FRAME_HEADER_LEN - header.len()));
                    if header.len() < FRAME_HEADER_LEN {
                        return Ok(());
                    }
                    let frame = Frame::of(header);
                    if self.begun.is_some() != (frame.kind == CONTINUATION) {
                        return Err(wrong("a header block is interrupted"));
                    }
                    self.state = match frame.kind {
                        HEADERS | CONTINUATION if frame.len > FRAME_LEN_MAX => {
                            return Err(wrong("a frame is too long"));
                        }
                        HEADERS | CONTINUATION => State::Block { frame, bytes: Vec::new() },
                        _ => {
                            output.extend(&*header);
                            State::Pass(frame.len)
                        }
                    };
                }
                State::Block { frame, bytes } => {
                    bytes.extend(take(&mut input, frame.len - bytes.len()));
                    if bytes.len() < frame.len {
                        return Ok(());
                    }
                    let (frame, bytes) = (*frame, std::mem::take(bytes));
                    self.state = State::Pass(0);
                    self.block(frame, &bytes, output)?;
                }
            }
        }
    }

    /// Takes a frame with a part of a header block.
    fn block(&mut self, frame: Frame, bytes: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
        let (stream, flags, mut block) = match self.begun.take() {
            None => (frame.stream, frame.flags, fragment(frame.flags, bytes)?.to_vec()),
            Some((stream, _, _)) if stream != frame.stream => {
                return Err(wrong("a header block is interrupted"));
            }
            Some((stream, flags, mut block)) => {
                block.extend(bytes);
                (stream, flags, block)
            }
        };
        if block.len() > BLOCK_LEN_MAX {
            return Err(wrong("a header block is too long"));
        }
        if frame.flags & END_HEADERS == 0 {
            self.begun = Some((stream, flags, block));
            return Ok(());
        }
        block = self.plain(&block)?;
        write(stream, flags & END_STREAM, &block, output);
        Ok(())
    }

    /// A header block with a plain authority, which depends on no earlier one.
    fn plain(&mut self, block: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        let mut is_long = false;
        let decoded = self.decoder.decode_with_cb(block, |name: Cow<'_, [u8]>, value| {
            is_long |= plain.len() + name.len() + value.len() > BLOCK_LEN_MAX;
            if !is_long {
                let value = if &*name == AUTHORITY { PLAIN } else { &*value };
                // A literal that is not kept, with a new name (RFC 7541, 6.2.2).
                plain.push(0);
                text(&name, &mut plain);
                text(value, &mut plain);
            }
        });
        decoded.map_err(|error| wrong(&error.to_string()))?;
        if is_long {
            return Err(wrong("a header block is too long"));
        }
        Ok(plain)
    }
}

impl Frame {
    fn of(header: &[u8]) -> Self {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
        Self {
            len: number(&header[..3]) as usize,
            kind: header[3],
            flags: header[4],
            stream: number(&header[5..9]),
        }
    }

    fn write(self, output: &mut Vec<u8>) {
        let len = u32::try_from(self.len).expect("a frame is short");
        output.extend(&len.to_be_bytes()[1..]);
        output.extend([self.kind, self.flags]);
        output.extend(self.stream.to_be_bytes());
    }
}

/// The part of a header block in a frame of type HEADERS (RFC 9113, 6.2).
fn fragment(flags: u8, mut bytes: &[u8]) -> io::Result<&[u8]> {
    let short = || wrong("a frame is too short");
    let mut padding = 0;
    if flags & PADDED != 0 {
        let (first, rest) = bytes.split_first().ok_or_else(short)?;
        (padding, bytes) = (usize::from(*first), rest);
    }
    if flags & PRIORITY != 0 {
        bytes = bytes.get(PRIORITY_LEN..).ok_or_else(short)?;
    }
    let end = bytes.len().checked_sub(padding).ok_or_else(short)?;
    Ok(&bytes[..end])
}

/// Writes a header block, in as many frames as it needs.
fn write(stream: u32, end_stream: u8, block: &[u8], output: &mut Vec<u8>) {
    let mut left = block;
    let (mut kind, mut flags) = (HEADERS, end_stream);
    loop {
        let part = take(&mut left, FRAME_LEN_MAX);
        if left.is_empty() {
            flags |= END_HEADERS;
        }
        Frame { len: part.len(), kind, flags, stream }.write(output);
        output.extend(part);
        if left.is_empty() {
            return;
        }
        (kind, flags) = (CONTINUATION, 0);
    }
}

/// A text of a header block: its length with a prefix of 7 bits (RFC 7541, 5.1), its bytes.
fn text(bytes: &[u8], output: &mut Vec<u8>) {
    const PREFIX: usize = 0x7f;
    match bytes.len().checked_sub(PREFIX) {
        None => output.push(bytes.len() as u8),
        Some(mut rest) => {
            output.push(PREFIX as u8);
            while rest >= 0x80 {
                output.push((rest % 0x80 + 0x80) as u8);
                rest /= 0x80;
            }
            output.push(rest as u8);
        }
    }
    output.extend(bytes);
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a client of HTTP/2: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Header blocks, each in a frame of its own, after a preface.
    fn client(blocks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        for (index, block) in blocks.iter().enumerate() {
            write(index as u32 * 2 + 1, END_STREAM, block, &mut bytes);
        }
        bytes
    }

    fn rewritten(input: &[u8], step: usize) -> io::Result<Vec<u8>> {
        let (mut rewriter, mut output) = (Rewriter::new(), Vec::new());
        for part in input.chunks(step) {
            rewriter.push(part, &mut output)?;
        }
        Ok(output)
    }

    /// All headers of all blocks.
    fn headers(bytes: &[u8]) -> Vec<(String, String)> {
        let mut decoder = Decoder::new();
        let mut bytes = &bytes[PREFACE_LEN..];
        let (mut found, mut block) = (Vec::new(), Vec::new());
        while !bytes.is_empty() {
            let frame = Frame::of(take(&mut bytes, FRAME_HEADER_LEN));
            assert!(frame.len <= FRAME_LEN_MAX);
            block.extend(take(&mut bytes, frame.len));
            if frame.flags & END_HEADERS != 0 {
                let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
                let decoded = decoder.decode(&block).expect("a block");
                found.extend(decoded.into_iter().map(|(name, value)| (text(name), text(value))));
                block.clear();
            }
        }
        found
    }

    /// `:authority` as index 1 of the static table, kept in the client's table.
    fn authority(value: &[u8]) -> Vec<u8> {
        let mut block = vec![0x41];
        text(value, &mut block);
        block
    }

    #[test]
    fn rule_44_any_authority_becomes_plain_also_one_that_is_kept_in_the_table() {
        for value in [&b"/run/csi/csi.sock"[..], b"%2Frun%2Fcsi%2Fcsi.sock", b"", b"\xff"] {
            let first = [&[0x83][..], &authority(value), b"\x40\x01a\x01b"].concat();
            // The second one names the entries of the table: authority is the older.
            let input = client(&[&first, &[0xbf, 0xbe]]);
            let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
            let plain = || own(":authority", "localhost");
            let want = [own(":method", "POST"), plain(), own("a", "b"), plain(), own("a", "b")];
            for step in [1, 7, input.len()] {
                let output = rewritten(&input, step).expect("a good client");
                assert_eq!(headers(&output), want, "{value:?}");
            }
        }
    }

    #[test]
    fn other_frames_padding_and_long_blocks_pass() {
        let mut input = client(&[]);
        let settings = [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 9];
        input.extend(settings);
        // A block in two frames, the first one padded and with a priority.
        let long = [authority(b"/x"), b"\x40\x01a".to_vec()].concat();
        let mut value = Vec::new();
        text(&[b'v'; 40_000], &mut value);
        let first = [&[2][..], &[0; PRIORITY_LEN], &long, &[0; 2]].concat();
        let flags = PADDED | PRIORITY | END_STREAM;
        Frame { len: first.len(), kind: HEADERS, flags, stream: 1 }.write(&mut input);
        input.extend(first);
        let mut left = &value[..];
        while !left.is_empty() {
            let part = take(&mut left, FRAME_LEN_MAX);
            let flags = if left.is_empty() { END_HEADERS } else { 0 };
            Frame { len: part.len(), kind: CONTINUATION, flags, stream: 1 }.write(&mut input);
            input.extend(part);
        }
        let data = [&[0, 0, 3, 0, 1, 0, 0, 0, 1][..], b"abc"].concat();
        input.extend(&data);
        for step in [1, 1000, input.len()] {
            let output = rewritten(&input, step).expect("a good client");
            assert_eq!(&output[PREFACE_LEN..][..settings.len()], settings);
            assert!(output.ends_with(&data));
            let blocks = [
                &output[..PREFACE_LEN],
                &output[PREFACE_LEN + settings.len()..output.len() - data.len()],
            ]
            .concat();
            let headers = headers(&blocks);
            assert_eq!(headers[0].1, "localhost");
            assert_eq!(headers[1].1.len(), 40_000);
        }
    }

    #[test]
    fn broken_clients_are_refused() {
        let interrupted = {
            let mut input = client(&[]);
            Frame { len: 1, kind: HEADERS, flags: 0, stream: 1 }.write(&mut input);
            input.push(0x83);
            Frame { len: 0, kind: 0, flags: 0, stream: 1 }.write(&mut input);
            input
        };
        let mut endless = client(&[]);
        Frame { len: 1, kind: HEADERS, flags: 0, stream: 1 }.write(&mut endless);
        endless.push(0x83);
        for _ in 0..10 {
            let frame = Frame { len: FRAME_LEN_MAX, kind: CONTINUATION, flags: 0, stream: 1 };
            frame.write(&mut endless);
            endless.extend([0x83; FRAME_LEN_MAX]);
        }
        // A kept header of 4000 bytes, named 16 000 times.
        let mut bomb = b"\x40\x01a".to_vec();
        text(&[b'v'; 4000], &mut bomb);
        bomb.extend([0xbe; 12_000]);
        // An index beyond the table, a larger table, a text that is too short.
        let blocks: [&[u8]; 4] = [&bomb, &[0xff, 0xff, 0x7f], &[0x3f, 0xe2, 0x1f], &[0x41, 9, 1]];
        for block in blocks {
            assert!(rewritten(&client(&[block]), 100).is_err(), "{:?}", &block[..3]);
        }
        assert!(rewritten(&interrupted, 100).is_err());
        assert!(rewritten(&endless, 100).is_err());
    }

    mod hostile {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #[test]
            fn no_bytes_make_it_panic(
                block in proptest::collection::vec(any::<u8>(), 0..300),
                rest in proptest::collection::vec(any::<u8>(), 0..100),
                flags in any::<u8>(),
            ) {
                let mut input = client(&[]);
                Frame { len: block.len(), kind: HEADERS, flags, stream: 1 }.write(&mut input);
                input.extend(block);
                input.extend(rest);
                let _ = rewritten(&input, 50);
            }
        }
    }
}
