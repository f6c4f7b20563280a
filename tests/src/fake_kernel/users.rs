//! Programs that use a device, by NBD with simple replies.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use rustix::net::{SocketFlags, accept_with};
use sheave_daemon::DeviceKey;

use super::Shared;
use super::device::{COOKIE, REQUEST_LEN, User};
use super::real::FILE_SIZE;
use crate::wire::{cmd, errno, magic, opt, reply};

/// Handshake flags: fixed newstyle, no zeroes.
const HANDSHAKE_FLAGS: u16 = 3;
const CLIENT_NO_ZEROES: u32 = 2;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const OPTION_LEN_MAX: u32 = 64 << 10;
/// The longest request, as the kernel's clients have it.
const PAYLOAD_MAX: u32 = 32 << 20;

impl Shared {
    pub(super) fn accept_users(self: &Arc<Self>, listener: Arc<OwnedFd>, id: u32, key: DeviceKey) {
        let shared = Arc::clone(self);
        thread::spawn(move || {
            while let Ok(socket) = accept_with(&listener, SocketFlags::CLOEXEC) {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.serve_user(id, key, UnixStream::from(socket)));
            }
        });
    }

    fn serve_user(&self, id: u32, key: DeviceKey, stream: UnixStream) {
        let user = Arc::new(User::new(stream));
        let entered = {
            let mut devices = self.devices();
            let device = devices.same(id, key);
            device.and_then(|device| {
                let number = device.enter(Arc::clone(&user))?;
                Some((number, device.size, device.block, device.flags))
            })
        };
        let Some((number, size, block, flags)) = entered else { return };
        let size = if self.has_block_devices { FILE_SIZE } else { size };
        // A program that breaks the protocol or leaves has closed the device.
        if let Ok(true) = handshake(&user.stream, size, block, flags) {
            while let Ok(true) = self.pass_request(id, key, number, &user) {}
        }
        let mut devices = self.devices();
        if let Some(device) = devices.same(id, key) {
            device.leave(number);
            if device.ended && !device.is_in_use() {
                devices.end(id);
            }
        }
        drop(devices);
        self.changed.notify_all();
    }

    /// Passes a program's next request on; false when there are no more.
    fn pass_request(&self, id: u32, key: DeviceKey, number: u64, user: &User) -> io::Result<bool> {
        let mut stream = &user.stream;
        let mut bytes = vec![0; REQUEST_LEN];
        stream.read_exact(&mut bytes)?;
        if bytes[..4] != magic::REQUEST.to_be_bytes() {
            return Ok(false);
        }
        let command = u16::from_be_bytes(bytes[6..8].try_into().expect("two bytes"));
        let cookie = u64::from_be_bytes(bytes[COOKIE].try_into().expect("eight bytes"));
        let at = u64::from_be_bytes(bytes[16..24].try_into().expect("eight bytes"));
        let len = u32::from_be_bytes(bytes[24..28].try_into().expect("four bytes"));
        if command == cmd::DISC || len > PAYLOAD_MAX && command <= cmd::WRITE {
            return Ok(false);
        }
        if command == cmd::WRITE {
            bytes.resize(REQUEST_LEN + len as usize, 0);
            stream.read_exact(&mut bytes[REQUEST_LEN..])?;
        }
        let taken = {
            let mut devices = self.devices();
            let Some(device) = devices.same(id, key) else { return Ok(false) };
            if device.ended {
                user.reply(errno::EIO, cookie, &[]);
                return Ok(true);
            }
            let is_inside = at.checked_add(len.into()).is_some_and(|end| end <= device.size);
            let reply_len = if command == cmd::READ { len as usize } else { 0 };
            is_inside.then(|| device.take(number, bytes, reply_len))
        };
        match taken {
            Some((bytes, Some(server))) => server.send(&bytes),
            // It waits for a server.
            Some((_, None)) => {}
            None => user.reply(errno::EINVAL, cookie, &[]),
        }
        Ok(true)
    }
}

/// Lets a program choose the device, which is the only export; false if it does not.
fn handshake(mut stream: &UnixStream, size: u64, block: u32, flags: u16) -> io::Result<bool> {
    let mut greeting = magic::NBDMAGIC.to_be_bytes().to_vec();
    greeting.extend(magic::IHAVEOPT.to_be_bytes());
    greeting.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&greeting)?;
    let client = u32::from_be_bytes(receive(stream)?);
    loop {
        if receive(stream)? != magic::IHAVEOPT.to_be_bytes() {
            return Ok(false);
        }
        let option = u32::from_be_bytes(receive(stream)?);
        let len = u32::from_be_bytes(receive(stream)?);
        if len > OPTION_LEN_MAX {
            return Ok(false);
        }
        stream.read_exact(&mut vec![0; len as usize])?;
        let export = [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
        match option {
            opt::EXPORT_NAME => {
                stream.write_all(&export)?;
                if client & CLIENT_NO_ZEROES == 0 {
                    stream.write_all(&[0; 124])?;
                }
                return Ok(true);
            }
            opt::GO | opt::INFO => {
                let sizes = [block, 4096.max(block), PAYLOAD_MAX].map(u32::to_be_bytes).concat();
                let export = [&INFO_EXPORT.to_be_bytes()[..], &export].concat();
                answer(stream, option, reply::INFO, &export)?;
                let sizes = [&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat();
                answer(stream, option, reply::INFO, &sizes)?;
                answer(stream, option, reply::ACK, &[])?;
                if option == opt::GO {
                    return Ok(true);
                }
            }
            opt::ABORT => {
                answer(stream, option, reply::ACK, &[])?;
                return Ok(false);
            }
            _ => answer(stream, option, reply::ERR_UNSUP, &[])?,
        }
    }
}

fn answer(mut stream: &UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = magic::OPTION_REPLY.to_be_bytes().to_vec();
    for field in [option, kind, u32::try_from(data.len()).expect("a short answer")] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(data);
    stream.write_all(&bytes)
}

fn receive<const N: usize>(mut stream: &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
