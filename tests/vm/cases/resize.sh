#!/bin/bash
# A device grows while it is used, keeps its size after a crash, and never shrinks.
. ./common.sh

# has DEVICE MIB: what the kernel and the daemon say of it.
has() {
    expect $(($2 << 20)) "$(blockdev --getsize64 "$1")"
    expect "$1 $(($2 << 20))" "$(sheave ls --json | python3 -c 'import json, sys
for found in json.load(sys.stdin): print(found["device"], found["size_bytes"])')"
}

refused 'No such file' sheave volume resize disk.img --size 1M
truncate -s 64M plain.img
expect $((96 << 20)) "$(sheave volume resize plain.img --size 96M)"
expect $((96 << 20)) "$(stat -c %s plain.img)"
refused 'would cut data off' sheave volume resize plain.img --size 64M
refused 'part of its name' sheave volume resize 'memory:?size=1M' --size 2M

mkdir -p mounted
for front in $(fronts); do
    truncate -s 64M disk.img
    start_daemon
    device=$(sheave attach --front $front disk.img)
    if ! grows $front; then
        refused 'before Linux 6.16' sheave volume resize disk.img --size 128M
        expect $((64 << 20)) "$(stat -c %s disk.img)"
        sheave detach disk.img
        stop_daemon
        continue
    fi
    mkfs.ext4 -q "$device"
    mount "$device" mounted
    fio --name=load --filename=mounted/file --size=16M --ioengine=libaio --iodepth=16 --direct=1 \
        --rw=randrw --bs=4k --time_based --runtime=8 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=64 --max_latency=5s >fio.log 2>&1 &
    load=$!
    wait_for 'the load has begun' in_flight "$device" 1
    for mib in 96 128 160; do
        expect $((mib << 20)) "$(sheave volume resize disk.img --size ${mib}M)"
        has "$device" $mib
    done
    refused 'would cut data off' sheave volume resize "$device" --size 96M
    refused 'blocks of 512 bytes' sheave volume resize "$device" --size $(((160 << 20) + 1))
    has "$device" 160
    resize2fs "$device" >resize.log 2>&1 || fail "resize2fs: $(cat resize.log)"
    wait $load || fail "fio: $(cat fio.log)"
    # Where there was no device is written, too.
    head -c 120M /dev/urandom >mounted/large
    # It has grown by other means.
    truncate -s 192M disk.img
    has "$device" 160
    expect $((192 << 20)) "$(sheave volume resize disk.img)"
    has "$device" 192

    # A crash between the record and the kernel: the next daemon ends the work.
    kill_daemon
    record=$(ls /var/lib/sheave/devices/*.json)
    python3 - "$record" <<'P'
import json, sys, zlib
line = open(sys.argv[1]).readline().rstrip('\n')
line = line.replace('"size":%d' % (192 << 20), '"size":%d' % (224 << 20))
assert json.loads(line)['size'] == 224 << 20
open(sys.argv[1], 'w').write('%s\n%08x\n' % (line, zlib.crc32(line.encode())))
P
    truncate -s 224M disk.img
    start_daemon
    logged recovered
    has "$device" 224
    sum=$(sha256sum <mounted/large)
    umount mounted
    clean ext4 "$device"
    mount "$device" mounted
    expect "$sum" "$(sha256sum <mounted/large)"
    umount mounted
    # What has lost its name is still the device's.
    mv disk.img moved.img
    truncate -s 300M disk.img
    expect $((256 << 20)) "$(sheave volume resize "$device" --size 256M)"
    has "$device" 256
    expect "$((256 << 20)) $((300 << 20))" "$(stat -c %s moved.img disk.img | paste -sd ' ')"
    mv moved.img disk.img
    sheave detach disk.img

    # A request that takes long holds up neither others nor a resize.
    slow='disk.img?fault=read:delay=30s:range=64M-65M'
    device=$(sheave attach --front $front "$slow")
    dd if="$device" of=read.log bs=4k count=1 skip=$((16 << 10)) iflag=direct status=none &
    reader=$!
    wait_for 'the slow read has begun' in_flight "$device" 1
    expect $((320 << 20)) "$(sheave volume resize "$slow" --size 320M)"
    has "$device" 320
    # The kernel's NBD client lets requests in flight end before it takes a new size.
    [ $front = nbd ] || ! has_ended $reader || fail 'a resize waited for a slow read'
    wait $reader || fail 'a slow read failed'
    sheave detach "$slow"
    sheave attach --front $front 'memory:?size=1M' >/dev/null
    refused 'part of its name' sheave volume resize 'memory:?size=1M' --size 2M
    sheave detach 'memory:?size=1M'
    stop_daemon
    rm disk.img
done
