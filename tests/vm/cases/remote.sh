#!/bin/bash
# A remote volume is a device that outlives its server: the server is killed and started again under
# load, once together with the daemon, and no user of the device sees an error.
. ./common.sh

serve() {
    rm -f upstream
    sheave serve upstream.img --socket upstream --shards 1 >upstream.log 2>&1 &
    upstream=$!
    listens upstream $upstream
}

kill_upstream() {
    kill -9 $upstream
    ended $upstream 'a killed server'
    wait $upstream 2>/dev/null || true
}

mkdir -p mounted
for front in $(fronts); do
    truncate -s 128M upstream.img
    serve
    start_daemon
    device=$(sheave attach --front $front "nbd+unix:///?socket=$PWD/upstream")
    mkfs.ext4 -q "$device"
    mount "$device" mounted
    fio --name=load --filename=mounted/load --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
        --bs=4k --size=32M --time_based --runtime=10 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=256 --fsync=64 >fio.log 2>&1 &
    load=$!
    wait_for 'the load has begun' in_flight "$device" 1
    for round in 1 2 3; do
        dd if=/dev/urandom of=mounted/file.$round bs=1M count=4 conv=fsync status=none &
        writer=$!
        pause 0.$((RANDOM % 10))
        kill_upstream
        if [ $round = 2 ]; then
            kill_daemon
            # It starts without the server, and serves the device when that is back.
            start_daemon
            logged 'I/O is suspended'
            serve
            logged 'recovered volume='
        else
            pause 0.$((RANDOM % 10))
            serve
            logged 'connected again'
        fi
        wait $writer || fail 'a write failed'
    done
    wait $load || fail "fio: $(cat fio.log)"
    sha256sum mounted/file.* >sums
    umount mounted
    clean ext4 "$device"
    mount "$device" mounted
    sha256sum --quiet -c sums
    umount mounted
    sheave detach "$device"
    stop_daemon
    kill_upstream
    # What the device had is in the server's file.
    clean ext4 upstream.img
    rm upstream.img
done
