#!/bin/bash
# A daemon that is told to end serves on what is in use, and ends when nothing is.
. ./common.sh

truncate -s 256M disk.img
mkdir -p mounted
start_daemon
device=$(sheave attach disk.img)
sheave attach 'memory:?size=1M' >/dev/null
mkfs.ext4 -q "$device"
mount "$device" mounted
kill $daemon
logged "served on"
grep -q "served on.*$PWD/mounted" daemon.log || fail "it does not say where"
expect "$device rw" "$(sheave ls --json | python3 -c 'import json,sys
for found in json.load(sys.stdin): print(found["device"], "ro" if found["read_only"] else "rw")')"
refused 'is ending' sheave attach 'memory:?size=2M'
expect "$device" "$(sheave attach disk.img)"
cp /usr/bin/fio mounted/
umount mounted
timeout 20 tail --pid=$daemon -f /dev/null || fail 'it does not end'
wait $daemon || fail "the daemon ended with $?"
expect '' "$(connected)"
expect 1 "$(grep -c 'served on' daemon.log)"
[ ! -e /run/sheave/control.sock ] || fail 'its socket is there'
e2fsck -fn disk.img >fsck.log 2>&1 || fail "ext4: $(cat fsck.log)"

# Who insists is obeyed.
start_daemon
device=$(sheave attach disk.img)
mount "$device" mounted
cmp /usr/bin/fio mounted/fio
kill $daemon
logged 'served on'
kill $daemon
wait $daemon && fail 'it ended as if all were well'
grep -q 'second signal, SIGTERM, ended it with 1 devices' daemon.log || fail 'it said nothing'
# The next one serves it on.
start_daemon
logged recovered
cmp /usr/bin/fio mounted/fio
umount mounted
stop_daemon
expect '' "$(connected)"
