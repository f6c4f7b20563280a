"""Requests that a careful client would not send, each answered with the right error.

usage: bad_requests.py URI READ_ONLY_URI
"""

import errno
import sys

import nbd

uri, read_only_uri = sys.argv[1:]
NO_EXTENTS = lambda context, offset, entries, error: None  # noqa: E731


def connect(to, structured=True, contexts=("base:allocation",)):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(to)
    return h


def expect(name, call, *args):
    """The call fails with this errno, and the connection goes on working."""
    try:
        call(*args)
    except nbd.Error as error:
        want = getattr(errno, name)
        assert error.errnum == want, (call.__name__, args[1:], error, name)
        assert h.aio_is_ready(), (call.__name__, args[1:], error)
        h.pread(512, 0)
        return
    raise AssertionError(f"{call.__name__}{args} succeeded")


for structured in (True, False):
    h = connect(uri, structured)
    size = h.get_size()

    # Past the end: no room to write, nothing to read.
    expect("EINVAL", h.pread, 512, size)
    expect("EINVAL", h.pread, 513, size - 512)
    expect("EINVAL", h.pread, 512, 1 << 62)
    expect("ENOSPC", h.pwrite, b"x" * 512, size)
    expect("ENOSPC", h.pwrite, b"x" * 513, size - 512)
    expect("ENOSPC", h.zero, 513, size - 512)
    expect("EINVAL", h.trim, 513, size - 512)
    # The end of the range does not fit into 63 bits.
    expect("ENOSPC", h.pwrite, b"x" * 512, (1 << 63) - 512)

    # Flags that do not exist or do not belong to the command.
    for bad in (1 << 9, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO):
        expect("EINVAL", h.pread, 512, 0, bad)
        expect("EINVAL", h.pwrite, b"x" * 512, 0, bad)
    expect("EINVAL", h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    expect("EINVAL", h.flush, 1 << 9)
    # FUA is for every command.
    h.flush(nbd.CMD_FLAG_FUA)
    assert len(h.pread(512, 0, nbd.CMD_FLAG_FUA)) == 512
    assert h.pread(512, size - 512) == bytes(512), "nothing was written near the end"
    h.shutdown()

# Block status past the end, and without a context.
h = connect(uri)
expect("EINVAL", h.block_status, 512, size, NO_EXTENTS)
h.shutdown()
h = connect(uri, contexts=())
expect("EINVAL", h.block_status, 512, 0, NO_EXTENTS)
h.shutdown()

# A read-only export refuses whatever writes and changes nothing.
h = connect(read_only_uri)
assert h.is_read_only()
before = h.pread(65536, 0)
expect("EPERM", h.pwrite, b"x" * 512, 0)
expect("EPERM", h.zero, 512, 0)
expect("EPERM", h.trim, 512, 0)
assert h.pread(65536, 0) == before
h.shutdown()
