"""The haggling before a session, step by step on one connection.

usage: options.py SOCKET EXPORT
"""

import sys

import nbd

socket, export = sys.argv[1:]


def haggle():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.set_export_name(export)
    h.add_meta_context("base:allocation")
    h.connect_unix(socket)
    assert h.aio_is_negotiating()
    assert h.get_protocol() == "newstyle-fixed"
    return h


def names(h):
    found = []
    h.opt_list(lambda name, description: found.append(name))
    return found


def expect_refused(call):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == "ENOENT", error
    else:
        raise AssertionError("a wrong export name was accepted")


h = haggle()
assert export in names(h), names(h)
assert names(h) == names(h), "listing changes nothing"

# A wrong name is refused, and the same connection then gets the right one.
h.set_export_name("no such export")
expect_refused(h.opt_info)
expect_refused(h.opt_go)
h.set_export_name(export)
h.opt_info()
told = h.get_size(), h.is_read_only(), h.can_flush(), h.can_fua()
contexts = []
h.opt_list_meta_context(contexts.append)
assert "base:allocation" in contexts, contexts
h.opt_go()
assert h.aio_is_ready()
assert told == (h.get_size(), h.is_read_only(), h.can_flush(), h.can_fua())
assert h.can_meta_context("base:allocation")
h.pread(512, 0)
h.shutdown()

# Leaving before the session is polite.
h = haggle()
h.opt_abort()
assert h.aio_is_closed()

# An unknown context is ignored.
h = nbd.NBD()
h.set_export_name(export)
h.add_meta_context("x-nobody:nothing")
h.connect_unix(socket)
assert h.get_structured_replies_negotiated()
assert not h.can_meta_context("x-nobody:nothing")
h.shutdown()

# Clients from before NBD_OPT_GO choose by NBD_OPT_EXPORT_NAME.
for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.set_export_name(export)
    h.connect_unix(socket)
    assert h.get_protocol() == "newstyle"
    h.pwrite(b"old", 3)
    assert h.pread(3, 3) == b"old"
    h.shutdown()
