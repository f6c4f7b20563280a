"""Writes a pattern, then reads and verifies it until its standard input ends. Prints the rounds."""
import select
import sys

import nbd

h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
BLOCK, BLOCKS = 64 << 10, 8
data = [bytes((index * 7 + at) % 251 for at in range(BLOCK)) for index in range(BLOCKS)]
for index, block in enumerate(data):
    h.pwrite(block, index * BLOCK)
rounds = 0
print("ready", flush=True)
is_last = False
# Once more, after all that has changed.
while not is_last:
    is_last = bool(select.select([sys.stdin], [], [], 0)[0])
    for index, block in enumerate(data):
        assert h.pread(BLOCK, index * BLOCK) == block, f"block {index} after {rounds} rounds"
    rounds += 1
print(rounds, flush=True)
h.shutdown()
