#!/bin/bash
# Devices outlive their daemon: it is killed under load, and no program sees an error.
. ./common.sh

mkdir -p mounted
for front in $(fronts); do
    truncate -s 128M load.img files.img gone.img
    start_daemon
    device=$(sheave attach --front $front load.img)
    disk=$(sheave attach --front $front files.img)
    mkfs.ext4 -q "$disk"
    mount "$disk" mounted
    fio --name=load --filename="$device" --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
        --bs=4k --size=64M --time_based --runtime=20 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=256 >fio.log 2>&1 &
    load=$!
    wait_for 'the load has begun' in_flight "$device" 1
    for round in 1 2 3; do
        dd if=/dev/urandom of=mounted/file.$round bs=1M count=8 conv=fsync status=none &
        writer=$!
        pause 0.$((RANDOM % 10))
        kill_daemon
        start_daemon
        logged 'recovered volume="'"$PWD"'/load.img'
        logged 'recovered volume="'"$PWD"'/files.img'
        wait $writer || fail 'a write failed'
    done
    wait $load || fail "fio: $(cat fio.log)"
    sha256sum mounted/file.* >sums
    umount mounted
    clean ext4 "$disk"
    mount "$disk" mounted
    sha256sum --quiet -c sums
    umount mounted
    expect "$device" "$(sheave attach load.img)"
    sheave detach load.img
    sheave detach files.img

    # A volume that is not there waits for it; its I/O does, too.
    device=$(sheave attach --front $front gone.img)
    kill_daemon
    mv gone.img elsewhere.img
    start_daemon
    logged 'I/O is suspended'
    # So does one that is another file by now, even if it looks the same.
    kill_daemon
    cp elsewhere.img gone.img
    start_daemon
    logged 'another file'
    kill_daemon
    rm gone.img
    start_daemon
    logged 'No such file'
    dd if=/dev/urandom of="$device" bs=4k count=16 oflag=direct status=none &
    writer=$!
    refused 'waits for its volume' sheave detach "$device"
    [[ $(sheave ls) = *waits* ]] || fail "$(sheave ls)"
    mv elsewhere.img gone.img
    wait $writer || fail 'a write failed'
    sheave detach "$device"

    # What was in memory is gone, which must not look like zeroes.
    memory=$(sheave attach --front $front 'memory:?size=4M')
    kill_daemon
    start_daemon
    logged 'its memory is gone'
    expect 0 "$(dd if="$memory" bs=4k count=1 iflag=direct 2>dd.log | wc -c)"
    expect 'no devices' "$(sheave ls)"
    expect '' "$(connected)"
    expect '' "$(ls /var/lib/sheave/devices | grep json || true)"
    stop_daemon
    rm -f ./*.img
done
