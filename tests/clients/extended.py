"""Extended headers: lengths of more than 32 bits. Needs libnbd 1.18 or newer.

usage: extended.py URI SIZE_GIB
"""

import sys

import nbd

uri, gib = sys.argv[1], int(sys.argv[2])
SIZE = gib << 30
FAR = SIZE - (8 << 20)

h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_extended_headers_negotiated()
assert h.get_size() == SIZE


def extents(length, offset):
    found = []

    def collect(context, at, entries, error):
        assert context == "base:allocation" and at == offset
        found.extend(entries)

    h.block_status_64(length, offset, collect)
    return found


# One request for all of it.
assert sum(length for length, _ in extents(SIZE, 0)) >= SIZE
h.pwrite(b"far" * 1000, FAR)
h.flush()
assert h.pread(3000, FAR) == b"far" * 1000
found, at = extents(SIZE, 0), 0
for length, state in found:
    if at <= FAR < at + length:
        assert state == 0, found
    at += length

# Zero and trim of more than 4 GiB at once.
h.zero(SIZE, 0)
assert h.pread(3000, FAR) == bytes(3000)
h.pwrite(b"far" * 1000, FAR)
h.trim(SIZE // 2, 0)
assert h.pread(3000, FAR) == b"far" * 1000
if h.can_cache():
    h.cache(1 << 20, 0)
h.zero(1 << 20, FAR, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1 << 20, FAR) == bytes(1 << 20)

# A read comes in chunks, too.
h.pwrite(b"a" * 4096, 1 << 20)
parts = []
h.pread_structured(3 << 20, 0, lambda data, offset, status, error: parts.append((offset, status)))
assert parts, "chunks"

# Contexts can be chosen by request.
assert h.can_block_status_payload()
seen = []
h.block_status_filter(1 << 20, 0, ["base:allocation"], lambda c, o, e, err: seen.append(c))
assert seen == ["base:allocation"], seen

# Wrong requests are answered, not punished.
h.set_strict_mode(0)
for call, want in (
    (lambda: h.pread(512, SIZE), "EINVAL"),
    (lambda: h.zero(SIZE, 4096), "ENOSPC"),
    (lambda: h.trim(SIZE, 4096), "EINVAL"),
    (lambda: h.block_status_filter(512, 0, ["x-none:x"], lambda *a: None), "EINVAL"),
):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == want, error
    else:
        raise AssertionError(want)
assert h.pread(4096, 1 << 20) == b"a" * 4096
h.shutdown()
