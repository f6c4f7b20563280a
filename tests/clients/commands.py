"""Every command of the protocol, with and without structured replies, against a model.

usage: commands.py URI SIZE_MIB [any]

With "any" it does not ask for block sizes, and so may use any alignment.
"""

import random
import sys

import nbd

uri, mib = sys.argv[1], int(sys.argv[2])
ask_block_size = sys.argv[3:] != ["any"]
SIZE = mib << 20
random.seed(20)


def connect(structured):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_request_block_size(ask_block_size)
    if structured:
        h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == structured
    return h


def random_range(align=1, longest=300_000):
    start = random.randrange(0, SIZE // align) * align
    length = min(random.randrange(1, longest // align + 2) * align, SIZE - start)
    return start, length


def check_model(h, rounds):
    """Random writes and zeroes, and reads of what must be there."""
    model = bytearray(h.pread(min(SIZE, 1 << 20), 0))
    while len(model) < SIZE:
        model += h.pread(min(SIZE - len(model), 1 << 20), len(model))
    for round_number in range(rounds):
        start, length = random_range()
        end = start + length
        flags = random.choice([0, nbd.CMD_FLAG_FUA])
        kind = random.randrange(4)
        if kind == 0:
            flags |= random.choice([0, nbd.CMD_FLAG_NO_HOLE])
            h.zero(length, start, flags)
            model[start:end] = bytes(length)
        elif kind == 1:
            data = random.randbytes(length)
            h.pwrite(data, start, flags)
            model[start:end] = data
        elif kind == 2:
            h.flush()
        else:
            assert h.pread(length, start) == model[start:end], (round_number, start, length)
    at = 0
    while at < SIZE:
        length = min(1 << 20, SIZE - at)
        assert h.pread(length, at) == model[at : at + length], at
        at += length


def check_block_size(h):
    kinds = nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM
    minimum, preferred, maximum = map(h.get_block_size, kinds)
    assert minimum & (minimum - 1) == 0 and minimum <= 65536, minimum
    assert preferred >= max(minimum, 512) and maximum >= 1 << 20, (preferred, maximum)


def check_fast_zero(h):
    """Fast, or refused at once and without an effect."""
    assert h.can_fast_zero()
    h.pwrite(b"x" * 65536, 0)
    try:
        h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert h.pread(65536, 0) == bytes(65536)
    except nbd.Error as error:
        assert error.errno == "ENOTSUP", error
        assert h.pread(65536, 0) == b"x" * 65536


def check_structured_read(h):
    """The chunks of a read cover it once and hold what a plain read returns."""
    h.zero(4 << 20, 0)
    h.pwrite(b"d" * 100_000, 1 << 20)
    want = h.pread(4 << 20, 0)
    for flags in (0, nbd.CMD_FLAG_DF):
        seen = bytearray(b"?" * (4 << 20))
        covered = []

        def chunk(data, offset, status, error):
            assert error.value == 0
            assert status in (nbd.READ_DATA, nbd.READ_HOLE), status
            assert status == nbd.READ_DATA or not any(data), "a hole with data in it"
            seen[offset : offset + len(data)] = data
            covered.append((offset, len(data)))

        length = 4 << 20 if flags == 0 else 65536
        got = h.pread_structured(length, 0, chunk, flags)
        assert got == want[:length] == seen[:length]
        covered.sort()
        for (start, size), (following, _) in zip(covered, covered[1:] + [(length, 0)]):
            assert start + size == following, covered
        if flags == nbd.CMD_FLAG_DF:
            assert len(covered) == 1, covered


def extents(h, length, offset, flags=0):
    found = []

    def collect(context, at, entries, error):
        assert context == "base:allocation" and at == offset and error.value == 0
        found.append(list(zip(entries[::2], entries[1::2])))

    h.block_status(length, offset, collect, flags)
    assert len(found) == 1, found
    return found[0]


def check_block_status(h):
    assert h.can_meta_context("base:allocation")
    h.zero(SIZE, 0)
    h.pwrite(b"d" * 65536, 1 << 20)
    at, states = 0, []
    while at < SIZE:
        for length, state in extents(h, SIZE - at, at):
            assert length > 0 and state & ~3 == 0
            states.append((at, min(length, SIZE - at), state))
            at += length
    data = [(start, length) for start, length, state in states if not state & nbd.STATE_ZERO]
    assert any(start <= 1 << 20 < start + length for start, length in data), states
    for start, length, state in states:
        if state & nbd.STATE_ZERO:
            some = min(length, 65536)
            assert h.pread(some, start) == bytes(some), (start, length)
    one = extents(h, SIZE, 0, nbd.CMD_FLAG_REQ_ONE)
    assert len(one) == 1 and one[0][0] <= SIZE, one


def check_hints(h):
    """Trim and cache may do nothing, but not fail and not spread."""
    h.pwrite(b"k" * (3 << 20), 0)
    if h.can_trim():
        h.trim(1 << 20, 1 << 20)
        h.trim(1 << 20, 1 << 20, nbd.CMD_FLAG_FUA)
    if h.can_cache():
        h.cache(1 << 20, 0)
    assert h.pread(1 << 20, 0) == b"k" * (1 << 20)
    assert h.pread(1 << 20, 2 << 20) == b"k" * (1 << 20)


for structured in (True, False):
    h = connect(structured)
    assert h.get_size() == SIZE
    assert not h.is_read_only()
    for can in ("flush", "fua", "zero", "trim", "multi_conn"):
        assert getattr(h, f"can_{can}")(), can
    assert h.can_df() == structured
    if ask_block_size:
        check_block_size(h)
    check_model(h, 200)
    check_hints(h)
    check_fast_zero(h)
    if structured:
        check_structured_read(h)
        check_block_status(h)
    h.flush()
    h.shutdown()
