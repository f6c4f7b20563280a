"""Many requests at once, on several connections, against a model.

usage: in_flight.py URI SIZE_MIB [any]

With "any" it does not ask for block sizes, and so may use any alignment.
"""

import random
import sys

import nbd

uri, mib = sys.argv[1], int(sys.argv[2])
ask_block_size = sys.argv[3:] != ["any"]
SIZE = mib << 20
DEPTH, CONNECTIONS, ROUNDS = 64, 3, 40
random.seed(21)


def connect():
    h = nbd.NBD()
    h.set_request_block_size(ask_block_size)
    h.connect_uri(uri)
    assert h.can_multi_conn()
    return h


def finish(h, cookies):
    while cookies:
        cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
        if cookies:
            h.poll(-1)


handles = [connect() for _ in range(CONNECTIONS)]
model = bytearray(SIZE)
for h in handles[:1]:
    h.zero(SIZE, 0)

for _ in range(ROUNDS):
    # Ranges of one round do not touch, so that their order does not matter.
    cuts = sorted(random.sample(range(SIZE), 2 * DEPTH))
    flying = [[] for _ in handles]
    for start, end in zip(cuts[::2], cuts[1::2]):
        end = min(end, start + 200_000)
        index = random.randrange(CONNECTIONS)
        data = random.randbytes(end - start)
        model[start:end] = data
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        flying[index].append(handles[index].aio_pwrite(buffer, start))
    for h, cookies in zip(handles, flying):
        finish(h, cookies)

    # What one connection wrote, every connection reads.
    reads = [[] for _ in handles]
    for _ in range(DEPTH):
        start = random.randrange(SIZE)
        length = random.randrange(1, min(200_000, SIZE - start) + 1)
        index = random.randrange(CONNECTIONS)
        buffer = nbd.Buffer(length)
        cookie = handles[index].aio_pread(buffer, start)
        reads[index].append((cookie, buffer, start, length))
    for h, flights in zip(handles, reads):
        finish(h, [cookie for cookie, *_ in flights])
        for _, buffer, start, length in flights:
            assert buffer.to_bytearray() == model[start : start + length], (start, length)

for h in handles:
    h.flush()
    h.shutdown()
