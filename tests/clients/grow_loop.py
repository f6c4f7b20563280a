"""Sets the size of a loop device, also while it is mounted: grow_loop.py DEVICE BYTES."""
import fcntl
import struct
import sys

# include/uapi/linux/loop.h
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
STATUS_LEN = 232
SIZE_LIMIT = slice(32, 40)

with open(sys.argv[1], 'rb') as device:
    status = bytearray(STATUS_LEN)
    fcntl.ioctl(device, LOOP_GET_STATUS64, status)
    status[SIZE_LIMIT] = struct.pack('=Q', int(sys.argv[2]))
    fcntl.ioctl(device, LOOP_SET_STATUS64, status)
