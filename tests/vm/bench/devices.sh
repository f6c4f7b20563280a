#!/bin/bash
# Devices of all kinds beside one another, in one guest: all are made, then measured in turns, so
# that each round has all of them. One line a measurement: workload, device, requests a second, CPU
# of its server in microseconds a request. Then how long devices take to be made.
# ROUNDS=3 SECONDS_EACH=4 ATTACHES=15
. ./common.sh

rounds=${ROUNDS:-3}
seconds=${SECONDS_EACH:-4}
attaches=${ATTACHES:-15}
mib=384
declare -A device server

tar -xzf peers.tgz
# peer PROGRAM ARGUMENT...: with the libraries that it came with.
peer() {
    local program=$1
    shift
    LD_LIBRARY_PATH=$PWD/peers/lib "$PWD/peers/bin/$program" "$@"
}

# new_ublk COMMAND...: the device that is there after it.
new_ublk() {
    local before
    before=$(ls /dev/ublkb* 2>/dev/null || true)
    "$@" >rublk.log 2>&1 || fail "$*: $(cat rublk.log)"
    wait_for "a device of $*" is_new "$before"
}

# is_new DEVICES: there is another one, in `found`.
is_new() {
    found=$(comm -13 <(sort <<<"$1") <(ls /dev/ublkb* 2>/dev/null | sort) | head -n 1)
    [ -n "$found" ]
}

# ticks PID: CPU that it has used, in hundredths of a second.
ticks() {
    [ "$1" != 0 ] || { echo 0; return; }
    sed 's/.*) //' "/proc/$1/stat" | awk '{ print $12 + $13 }'
}

# measure WORKLOAD NAME: rw:block:depth.
measure() {
    local rw bs depth before
    IFS=: read -r rw bs depth <<<"$1"
    before=$(ticks "${server[$2]}")
    fio --name=x --filename="${device[$2]}" --direct=1 --ioengine=io_uring --iodepth="$depth" \
        --rw="$rw" --bs="$bs" --size=${mib}M --time_based --runtime="$seconds" --norandommap \
        --randrepeat=0 --output-format=json --output=fio.json 2>fio.err || fail "$(cat fio.err)"
    python3 - "$1" "$2" $(($(ticks "${server[$2]}") - before)) <<'P'
import json, sys
workload, name, ticks = sys.argv[1:]
job = json.load(open('fio.json'))['jobs'][0]
done = job['read']['total_ios'] + job['write']['total_ios']
rate = job['read']['iops'] + job['write']['iops']
print(f'{workload} {name} {rate:.0f} {int(ticks) * 10000 / max(done, 1):.1f}')
P
}

head -c ${mib}M /dev/urandom >ublk.img
for name in direct nbd nbdkit qemu loop rublk; do cp ublk.img $name.img; done
sync

start_daemon
made() { device[$1]=$2; server[$1]=$3; }
made sheave-ublk-memory "$(sheave attach --front ublk "memory:?size=${mib}M")" "$daemon"
made sheave-nbd-memory "$(sheave attach --front nbd "memory:?size=$((mib << 10))K")" "$daemon"
made sheave-ublk-file "$(sheave attach --front ublk ublk.img)" "$daemon"
# rublk bypasses the page cache, too.
made sheave-ublk-direct "$(sheave attach --front ublk "$PWD/direct.img?direct=true")" "$daemon"
made sheave-nbd-file "$(sheave attach --front nbd nbd.img)" "$daemon"
made sheave-ublk-null "$(sheave attach --front ublk "null:?size=${mib}M")" "$daemon"
peer nbdkit -f -U nbdkit-memory.sock "$PWD/peers/lib/nbdkit-memory-plugin.so" ${mib}M 2>peer.log &
nbdkit_memory=$!
peer nbdkit -f -U nbdkit-file.sock "$PWD/peers/lib/nbdkit-file-plugin.so" nbdkit.img 2>>peer.log &
nbdkit_file=$!
peer qemu-nbd -f raw -t --cache=writeback --aio=io_uring -k "$PWD/qemu.sock" qemu.img 2>>peer.log &
qemu=$!
number=10
for name in "nbdkit-memory $nbdkit_memory" "nbdkit-file $nbdkit_file" "qemu $qemu"; do
    read -r name pid <<<"$name"
    listens $name.sock $pid
    nbd-client -unix $name.sock /dev/nbd$number -b 512 >>peer.log 2>&1
    number=$((number + 1))
done
# The shell of the function is its parent.
child() { pgrep -P "$1" || echo "$1"; }
made nbdkit-memory /dev/nbd10 "$(child $nbdkit_memory)"
made nbdkit-file /dev/nbd11 "$(child $nbdkit_file)"
made qemu-nbd-file /dev/nbd12 "$(child $qemu)"
made loop-file "$(losetup --find --show loop.img)" 0
new_ublk peer rublk add null -q 2
made rublk-null "$found" "$(pgrep -n rublk)"
new_ublk peer rublk add loop -f "$PWD/rublk.img" -q 2
made rublk-file "$found" "$(pgrep -n rublk)"

# What is in memory must be there before it is read.
for name in sheave-ublk-memory sheave-nbd-memory nbdkit-memory; do
    dd if=ublk.img of="${device[$name]}" bs=1M oflag=direct status=none
done
for round in $(seq "$rounds"); do
    for workload in ${WORKLOADS:-randread:4k:32 randwrite:4k:32 read:1m:4 write:1m:4}; do
        for name in sheave-ublk-memory sheave-nbd-memory nbdkit-memory sheave-ublk-file \
            sheave-ublk-direct sheave-nbd-file nbdkit-file qemu-nbd-file loop-file rublk-file \
            sheave-ublk-null rublk-null; do
            measure "$workload" $name
        done
    done
done

# attach WHAT COMMAND...: milliseconds from the command to a first byte read.
attach_ms() {
    local what=$1 from_us=${EPOCHREALTIME/[.,]/} made
    shift
    made=$("$@")
    dd if="${made:-/dev/nbd14}" of=/dev/null bs=4k count=1 iflag=direct status=none
    echo "attach $what $(((${EPOCHREALTIME/[.,]/} - from_us) / 1000)) 0"
}
connect_nbdkit() { nbd-client -unix nbdkit-again.sock /dev/nbd14 -b 512 >>peer.log 2>&1; }
serve_and_connect() {
    peer nbdkit -f -U nbdkit-new.sock "$PWD/peers/lib/nbdkit-file-plugin.so" again.img >>peer.log 2>&1 &
    listens nbdkit-new.sock $!
    nbd-client -unix nbdkit-new.sock /dev/nbd14 -b 512 >>peer.log 2>&1
}
truncate -s 64M again.img again.ublk again.nbd
peer nbdkit -f -U nbdkit-again.sock "$PWD/peers/lib/nbdkit-file-plugin.so" again.img >>peer.log 2>&1 &
listens nbdkit-again.sock $!
for round in $(seq "$attaches"); do
    attach_ms nbd-client-nbdkit connect_nbdkit
    nbd-client -d /dev/nbd14 >/dev/null
    attach_ms sheave-ublk sheave attach --front ublk again.ublk
    sheave detach again.ublk
    attach_ms sheave-nbd sheave attach --front nbd again.nbd
    sheave detach again.nbd
    attach_ms nbd-client-new-nbdkit serve_and_connect
    nbd-client -d /dev/nbd14 >/dev/null
    rm nbdkit-new.sock
done
for number in 10 11 12; do nbd-client -d /dev/nbd$number >/dev/null; done
peer rublk del -a >/dev/null 2>&1
losetup --detach "${device[loop-file]}"
pkill nbdkit || true
