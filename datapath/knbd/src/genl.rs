//! Generic netlink: messages of attributes to a family of the kernel's (netlink(7);
//! include/uapi/linux/{netlink,genetlink}.h). All numbers are in the host's order.
#![expect(clippy::host_endian_bytes, reason = "netlink is")]

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto};

const HEADER_LEN: usize = 16;
const GENL_HEADER_LEN: usize = 4;
const ATTR_HEADER_LEN: usize = 4;
const ALIGN: usize = 4;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const CONTROLLER: u16 = 16;
const CTRL_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;

/// The kernel's answers are a page at most.
const RECEIVE_LEN: usize = 16 << 10;
/// The answer is ready when the request has been sent; this bounds the wait for a kernel that
/// hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The most messages that are not the answer, such as those to an earlier request.
const STRAYS_MAX: usize = 64;

/// A socket to the kernel.
pub(crate) struct Genl {
    socket: OwnedFd,
    sequence: u32,
}

/// Messages that the kernel multicasts to a group.
pub(crate) struct Listener(OwnedFd);

/// Attributes of a request, in the order in which they are put.
#[derive(Default)]
pub(crate) struct Attributes(Vec<u8>);

/// An attribute of an answer.
#[derive(Clone, Copy)]
pub(crate) struct Attribute<'a> {
    pub(crate) kind: u16,
    pub(crate) content: &'a [u8],
}

impl Genl {
    pub(crate) fn open() -> io::Result<Self> {
        let socket = open_socket()?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The number of a family; `NotFound` when no module has registered it.
    pub(crate) fn family(&mut self, name: &str) -> io::Result<u16> {
        let answer = self.look_up(name)?;
        attributes_of(&answer)
            .find(|attribute| attribute.kind == CTRL_ATTR_FAMILY_ID)
            .and_then(|attribute| attribute.u16())
            .ok_or_else(|| malformed("a family without a number"))
    }

    /// The number of a family's group of listeners; `NotFound` as [`Self::family`].
    pub(crate) fn group(&mut self, family: &str, name: &str) -> io::Result<u32> {
        let answer = self.look_up(family)?;
        let groups = attributes_of(&answer).find(|found| found.kind == CTRL_ATTR_MCAST_GROUPS);
        let group = groups.and_then(|groups| {
            attributes_of(groups.content).find_map(|group| {
                let field = |kind| attributes_of(group.content).find(|found| found.kind == kind);
                let is_it = field(CTRL_ATTR_MCAST_GRP_NAME)?.text() == name.as_bytes();
                is_it.then_some(field(CTRL_ATTR_MCAST_GRP_ID)?.u32()?)
            })
        });
        group.ok_or_else(|| malformed("a family without its group"))
    }

    fn look_up(&mut self, name: &str) -> io::Result<Vec<u8>> {
        let mut attributes = Attributes::default();
        attributes.put_text(CTRL_ATTR_FAMILY_NAME, name);
        self.call(CONTROLLER, CTRL_GETFAMILY, &attributes)
    }

    /// Sends a request and answers with the attributes of the message that came before the kernel's
    /// acknowledgement, if there was one.
    pub(crate) fn call(
        &mut self,
        family: u16,
        command: u8,
        attributes: &Attributes,
    ) -> io::Result<Vec<u8>> {
        self.sequence += 1;
        let request = message(family, self.sequence, command, &attributes.0);
        sendto(&self.socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = Vec::new();
        let mut buffer = [0; RECEIVE_LEN];
        for _ in 0..STRAYS_MAX {
            // With a timeout it is not resumed after a signal (signal(7)).
            let (count, whole) =
                retry_on_intr(|| recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC))?;
            if whole > count {
                return Err(malformed("an answer that is too long"));
            }
            let mut rest = &buffer[..count];
            while let Some(message) = next_message(&mut rest) {
                // The answer to an earlier request must not be taken for this one's.
                if message.sequence != self.sequence {
                    continue;
                }
                if message.kind != NLMSG_ERROR {
                    answer = message.content.get(GENL_HEADER_LEN..).unwrap_or_default().to_vec();
                    continue;
                }
                let errno = message.content.get(..4).and_then(|bytes| bytes.try_into().ok());
                return match errno.map(i32::from_ne_bytes) {
                    Some(0) => Ok(answer),
                    Some(errno) => Err(io::Error::from_raw_os_error(errno.wrapping_neg())),
                    None => Err(malformed("an error without a number")),
                };
            }
        }
        Err(malformed("no acknowledgement"))
    }
}

impl Listener {
    /// Listens to a group.
    ///
    /// # Errors
    /// `Unsupported` for a group that cannot be joined by binding, and errors of the kernel.
    pub(crate) fn open(group: u32) -> io::Result<Self> {
        let bit = group.checked_sub(1).and_then(|bit| 1_u32.checked_shl(bit));
        let bit = bit.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        let socket = open_socket()?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, bit))?;
        Ok(Self(socket))
    }

    /// Waits for a message, for a bounded time. False if none came.
    pub(crate) fn wait(&self, within: Duration) -> io::Result<bool> {
        set_socket_timeout(&self.0, Timeout::Recv, Some(within))?;
        let mut buffer = [0; RECEIVE_LEN];
        match recv(&self.0, &mut buffer[..], RecvFlags::empty()) {
            // Messages that were dropped for want of room were of this group, too.
            Ok(_) | Err(Errno::NOBUFS) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Attributes {
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_ne_bytes());
    }

    pub(crate) fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_ne_bytes());
    }

    pub(crate) fn put_text(&mut self, kind: u16, value: &str) {
        self.put(kind, &[value.as_bytes(), &[0]].concat());
    }

    pub(crate) fn put_nested(&mut self, kind: u16, inner: &Self) {
        self.put(kind | NLA_F_NESTED, &inner.0);
    }

    fn put(&mut self, kind: u16, content: &[u8]) {
        let len = u16::try_from(ATTR_HEADER_LEN + content.len()).expect("attributes are short");
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
    }
}

impl<'a> Attribute<'a> {
    pub(crate) fn u8(self) -> Option<u8> {
        self.content.first().copied()
    }

    /// Without the zero at its end.
    fn text(self) -> &'a [u8] {
        self.content.strip_suffix(&[0]).unwrap_or(self.content)
    }

    pub(crate) fn u16(self) -> Option<u16> {
        Some(u16::from_ne_bytes(self.content.get(..2)?.try_into().ok()?))
    }

    pub(crate) fn u32(self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.content.get(..4)?.try_into().ok()?))
    }
}

/// The attributes in the content of a message, or of a nested attribute. Ends at the first that is
/// not whole.
pub(crate) fn attributes_of(mut rest: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let content = rest.get(ATTR_HEADER_LEN..len)?;
        rest = rest.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some(Attribute { kind, content })
    })
}

fn open_socket() -> io::Result<OwnedFd> {
    let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
    Ok(rustix::net::socket_with(family, SocketType::RAW, flags, Some(GENERIC))?)
}

struct Message<'a> {
    kind: u16,
    sequence: u32,
    content: &'a [u8],
}

fn message(family: u16, sequence: u32, command: u8, attributes: &[u8]) -> Vec<u8> {
    let len = HEADER_LEN + GENL_HEADER_LEN + attributes.len();
    let mut message = Vec::with_capacity(len);
    message.extend_from_slice(&u32::try_from(len).expect("requests are short").to_ne_bytes());
    message.extend_from_slice(&family.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    // The kernel fills in the sender's port.
    message.extend_from_slice(&[0; 4]);
    // Version 1, and two reserved bytes.
    message.extend_from_slice(&[command, 1, 0, 0]);
    message.extend_from_slice(attributes);
    message
}

fn next_message<'a>(rest: &mut &'a [u8]) -> Option<Message<'a>> {
    let bytes = *rest;
    let field = |at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    let len = usize::try_from(field(0)?).ok()?;
    let content = bytes.get(HEADER_LEN..len)?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let sequence = field(8)?;
    *rest = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
    Some(Message { kind, sequence, content })
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_found_again() {
        let mut inner = Attributes::default();
        inner.put_u32(1, 7);
        let mut attributes = Attributes::default();
        attributes.put_text(10, "odd");
        attributes.put_nested(7, &inner);
        attributes.put_u64(2, 1 << 40);
        let found: Vec<_> = attributes_of(&attributes.0).map(|a| (a.kind, a.content)).collect();
        assert_eq!(found[0], (10, &b"odd\0"[..]));
        assert_eq!(found[2], (2, &(1u64 << 40).to_ne_bytes()[..]));
        let (kind, nested) = found[1];
        assert_eq!(kind, 7);
        assert_eq!(attributes_of(nested).next().unwrap().u32(), Some(7));
    }

    #[test]
    fn what_is_cut_short_ends_quietly() {
        let mut attributes = Attributes::default();
        attributes.put_u32(1, 7);
        attributes.put_u32(2, 8);
        let whole = attributes.0;
        for len in 0..whole.len() {
            let found = attributes_of(&whole[..len]).count();
            assert_eq!(found, usize::from(len >= 8), "of {len} bytes");
        }
        let message = message(16, 1, 3, &whole);
        for len in 0..message.len() {
            assert!(next_message(&mut &message[..len]).is_none(), "of {len} bytes");
        }
        assert_eq!(next_message(&mut &message[..]).unwrap().sequence, 1);
        // A length of less than a header.
        assert!(next_message(&mut &[0; 32][..]).is_none());
        assert_eq!(attributes_of(&[0; 32]).count(), 0);
    }

    #[test]
    fn the_kernel_knows_its_own_family_and_not_another() {
        let mut genl = Genl::open().unwrap();
        assert_eq!(genl.family("nlctrl").unwrap(), CONTROLLER);
        let error = genl.family("no-such-family").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(genl.family("nlctrl").unwrap(), CONTROLLER);
    }

    #[test]
    fn a_group_is_found_and_listened_to() {
        let mut genl = Genl::open().unwrap();
        let group = genl.group("nlctrl", "notify").unwrap();
        assert!(genl.group("nlctrl", "no-such-group").is_err());
        let listener = Listener::open(group).unwrap();
        assert!(!listener.wait(Duration::from_millis(1)).unwrap());
        assert!(Listener::open(0).is_err() && Listener::open(33).is_err());
    }
}
