#!/bin/bash
# A daemon that gets SIGTERM keeps serving devices in use, and ends when none is.
. ./common.sh

mkdir -p mounted
for front in $(fronts); do
    truncate -s 256M disk.img
    start_daemon
    device=$(sheave attach --front $front disk.img)
    sheave attach --front $front 'memory:?size=1M' >/dev/null
    mkfs.ext4 -q -F "$device"
    mount "$device" mounted
    kill $daemon
    logged 'served on'
    grep 'served on' daemon.log | grep -q "$PWD/mounted" || fail 'it does not say by what'
    expect "$device rw" "$(sheave ls --json | python3 -c 'import json,sys
for found in json.load(sys.stdin): print(found["device"], "ro" if found["read_only"] else "rw")')"
    refused 'is ending' sheave attach 'memory:?size=2M'
    expect "$device" "$(sheave attach disk.img)"
    cp /usr/bin/fio mounted/
    umount mounted
    ended $daemon 'the daemon'
    wait $daemon || fail "the daemon ended with $?"
    expect '' "$(connected)"
    expect 1 "$(grep -c 'served on' daemon.log)"
    [ ! -e /run/sheave/control.sock ] || fail 'its socket is there'
    clean ext4 disk.img

    # A second signal ends it at once. The next daemon serves the devices in use.
    start_daemon
    device=$(sheave attach --front $front disk.img)
    mount "$device" mounted
    kill $daemon
    logged 'served on'
    kill $daemon
    ended $daemon 'the daemon'
    wait $daemon && fail 'it ended as if all were well'
    grep -q 'second signal, SIGTERM, ended it with 1 devices' daemon.log || fail 'it said nothing'
    start_daemon
    logged recovered
    cmp /usr/bin/fio mounted/fio
    umount mounted
    sheave detach "$device"
    stop_daemon
    rm disk.img
done
