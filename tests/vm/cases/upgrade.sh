#!/bin/bash
# A daemon gives way to another under load: the same devices, no error, a short pause.
. ./common.sh

# The next daemon's process, in $daemon.
take_over() {
    local old=$daemon
    mv daemon.log old.log
    if [ "$1" = signal ]; then
        # The successor is a child of the daemon, and writes where that writes.
        cp old.log daemon.log
        exec 8>>old.log
        kill -HUP "$old"
        ended "$old" 'the daemon that gives way'
        mv old.log daemon.log
        daemon=$(pgrep -nf 'sheave daemon.*--takeover')
    else
        sheave daemon --takeover >daemon.log 2>&1 &
        daemon=$!
        ended "$old" 'the daemon that gives way'
    fi
    for front in $(fronts); do logged 'recovered volume="'"$PWD/$front.img"; done
}

# reads VOLUME: how many have been counted.
reads() {
    sheave stats --json "$1" | python3 -c 'import json, sys
print(sum(stage["count"] for server in json.load(sys.stdin) for volume in server["volumes"]
    for op in volume["ops"] if op["op"] == "read"
    for stage in op["stages"] if stage["stage"] == "total"))'
}

start_daemon
loads=()
for front in $(fronts); do
    truncate -s 64M $front.img
    device=$(sheave attach --front $front $front.img)
    fio --name=$front --filename="$device" --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw \
        --bs=4k --size=32M --time_based --runtime=20 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=64 >fio.$front.log 2>&1 &
    loads+=($!)
    wait_for 'the load has begun' in_flight "$device" 1
done
devices=$(sheave ls --json)
for round in 1 2 3; do
    pause 2
    take_over now
    expect "$devices" "$(sheave ls --json)"
done
has_reads() { before=$(reads "$PWD/nbd.img") && [ "$before" -gt 0 ]; }
wait_for 'reads are counted' has_reads
take_over signal
expect "$devices" "$(sheave ls --json)"
[ "$(reads "$PWD/nbd.img")" -ge "$before" ] || fail 'statistics were lost'
for load in "${loads[@]}"; do wait "$load" || fail "fio: $(cat fio.*.log)"; done
! grep -q 'I/O is suspended' daemon.log || fail 'a device had to wait'

# What lives in the daemon's memory cannot go on without it.
sheave attach 'memory:?size=1M' >/dev/null
refused 'does not give way' sheave daemon --takeover
sheave detach 'memory:?size=1M'
# Nor what only this daemon still has open.
cp nbd.img copy.img
mv copy.img nbd.img
refused 'removed or replaced' sheave daemon --takeover
for front in $(fronts); do sheave detach $front.img; done
kill "$daemon"
ended "$daemon" 'the daemon'
expect '' "$(connected)"

# Without a daemon there is nothing to take over.
start_daemon --takeover
stop_daemon
