"""The NBD protocol over Python's own TLS, so that it can be broken at will."""

import os
import socket
import ssl
import struct

OPTION, REQUEST = b"IHAVEOPT", 0x25609513
STARTTLS, GO = 5, 7
READ, WRITE = 0, 1


def receive(stream, length):
    data = b""
    while len(data) < length:
        more = stream.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def option_reply(stream):
    _, _, kind, length = struct.unpack(">QIII", receive(stream, 20))
    return kind, receive(stream, length)


def starttls(port):
    stream = socket.create_connection(("localhost", port), timeout=20)
    receive(stream, 18)
    stream.sendall(struct.pack(">I", 3) + OPTION + struct.pack(">II", STARTTLS, 0))
    assert option_reply(stream)[0] == 1
    return stream


def context(directory):
    tls = ssl.create_default_context(cafile=os.path.join(directory, "ca-cert.pem"))
    tls.load_cert_chain(
        os.path.join(directory, "client-cert.pem"), os.path.join(directory, "client-key.pem")
    )
    return tls


def go(stream):
    stream.sendall(OPTION + struct.pack(">IIIH", GO, 6, 0, 0))
    while option_reply(stream)[0] != 1:
        pass


def request(command, cookie, offset, length):
    return struct.pack(">IHHQQI", REQUEST, 0, command, cookie, offset, length)


def simple_reply(stream):
    _, error, cookie = struct.unpack(">IIQ", receive(stream, 16))
    return error, cookie
