"""Sessions over TLS that end badly, beside one that must not notice.

usage: broken_tls.py PORT CERTIFICATES
"""

import socket
import ssl
import struct
import sys

from nbd_over_tls import READ, WRITE, context, go, receive, request, simple_reply, starttls

port, directory = int(sys.argv[1]), sys.argv[2]


def session():
    stream = context(directory).wrap_socket(starttls(port), server_hostname="localhost")
    go(stream)
    return stream


def raw(stream):
    """The socket below, to write into behind TLS's back."""
    sock = socket.socket(fileno=stream.detach())
    sock.settimeout(20)
    return sock


def expect_end(sock):
    try:
        while sock.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        pass


bystander = session()
data = bytes(range(256)) * 1024
bystander.sendall(request(WRITE, 1, 4 << 20, len(data)) + data)
assert simple_reply(bystander) == (0, 1)


def check_bystander():
    bystander.sendall(request(READ, 2, 4 << 20, len(data)))
    assert simple_reply(bystander) == (0, 2)
    assert receive(bystander, len(data)) == data


# A record that does not decrypt, an unknown kind of record, a record that is too long.
for record in (
    b"\x17\x03\x03\x00\x40" + b"x" * 64,
    b"\x99\x03\x03\x00\x40" + b"x" * 64,
    b"\x17\x03\x03\xff\xff" + b"x" * 70000,
    b"plain text",
):
    sock = raw(session())
    sock.sendall(record)
    if record == b"plain text":
        sock.shutdown(socket.SHUT_WR)
    expect_end(sock)
    sock.close()
    check_bystander()

# The end of the connection in the middle of a record, of a request, of a payload.
for cut in (1, 5, 20, 29, 1000, 40000):
    sock = raw(session())
    sock.sendall(b"\x17\x03\x03\x10\x00"[:cut])
    sock.close()
    stream = session()
    stream.sendall((request(WRITE, 3, 0, 65536) + b"y" * 65536)[:cut])
    sock = raw(stream)
    if cut % 2:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
check_bystander()

# A client that asks for much and reads nothing.
stuck = session()
stuck.settimeout(1)
try:
    for cookie in range(2000):
        stuck.sendall(request(READ, cookie, 0, 1 << 20))
except TimeoutError:
    pass
check_bystander()
stuck.close()
check_bystander()
