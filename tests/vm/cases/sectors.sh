#!/bin/bash
# A device has the logical block of the disk below it, so that its partitions are found; and keeps
# it after a crash and a resize.
. ./common.sh

# A disk with blocks of 4096 bytes and one partition, as a GPT that only such blocks make readable.
gpt_4k() {
    python3 - "$1" <<'P'
import binascii, struct, sys

BLOCK, COUNT = 4096, 16384
KIND = bytes.fromhex('af3dc60f838472478e793d69d8477de4')
entry = (KIND + bytes(15) + b'\1' + struct.pack('<QQQ', 512, 4607, 0)).ljust(128, b'\0')
table = entry.ljust(128 * 128, b'\0')

def header(here, other, entries):
    text = struct.pack('<8sIIIIQQQQ16sQIII', b'EFI PART', 0x10000, 92, 0, 0, here, other, 6, COUNT - 6,
                       bytes(15) + b'\2', entries, 128, 128, binascii.crc32(table))
    return text[:16] + struct.pack('<I', binascii.crc32(text)) + text[20:]

protective = struct.pack('<8BII', 0, 0, 2, 0, 0xee, 255, 255, 255, 1, COUNT - 1)
with open(sys.argv[1], 'wb') as disk:
    disk.truncate(BLOCK * COUNT)
    for block, skip, data in ((0, 446, protective), (0, 510, b'\x55\xaa'), (1, 0, header(1, COUNT - 1, 2)),
                              (2, 0, table), (COUNT - 5, 0, table),
                              (COUNT - 1, 0, header(COUNT - 1, 1, COUNT - 5))):
        disk.seek(block * BLOCK + skip)
        disk.write(data)
P
}

# blocks DEVICE LOGICAL: and what follows from it.
blocks() {
    local queue=/sys/block/${1#/dev/}/queue
    expect "$2" "$(blockdev --getss "$1")"
    expect "$2" "$(cat $queue/logical_block_size)"
    [ "$(cat $queue/physical_block_size)" -ge "$2" ] || fail "$1: its physical block is less"
    [ "$(cat $queue/minimum_io_size)" -ge "$2" ] || fail "$1: its least I/O is less"
}

# no_partition DEVICE: a table of other blocks is not read.
no_partition() { ! ls -d "/sys/block/${1#/dev/}/${1#/dev/}"p* 2>/dev/null || fail "$1: partitions"; }

# attached FRONT VOLUME LOGICAL
attached() {
    device=$(sheave attach --front "$1" "$2")
    blocks "$device" "$3"
    if [ "$3" = 4096 ]; then has_partition "$device"; else no_partition "$device"; fi
}

modprobe loop max_part=15
gpt_4k 4k.img
loop=$(losetup --find --show --sector-size 4096 4k.img)
for front in $(fronts); do
    start_daemon
    # Whatever way the data takes.
    for volume in $loop "$loop?direct=true"; do
        attached $front "$volume" 4096
        [ "$volume" = "$loop" ] || { sheave detach "$device"; continue; }
        mkfs.ext4 -q "${device}p1"
        fio --name=load --filename="${device}p1" --size=4M --bs=4k --rw=randrw --direct=1 \
            --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --io_size=8M >fio.log 2>&1 ||
            fail "$(cat fio.log)"
        kill_daemon
        start_daemon
        logged recovered
        blocks "$device" 4096
        dd if="${device}p1" of=/dev/null bs=1M iflag=direct status=none
        sheave detach "$device"
    done
    stop_daemon
done
losetup --detach "$loop"

for front in $(fronts); do
    start_daemon
    for parameters in '' '?direct=true'; do
        attached $front "4k.img$parameters" 512
        sheave detach "$device"
    done
    attached $front '4k.img?block=4096' 4096
    if [ $front = nbd ]; then
        refused 'blocks of 4096 bytes' sheave volume resize '4k.img?block=4096' --size 67109376
    fi
    sheave detach "$device"
    stop_daemon
done

start_daemon
truncate -s 1000000 odd.img
refused 'truncate -s %512' sheave attach odd.img
truncate -s 1000448 odd.img
refused 'truncate -s %4096' sheave attach 'odd.img?block=4096'
device=$(sheave attach odd.img)
blocks "$device" 512
sheave detach "$device"
stop_daemon
