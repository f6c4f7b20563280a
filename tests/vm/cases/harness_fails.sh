#!/bin/bash
# Fails on purpose, with all that the harness must clean up: mounted devices of a killed daemon,
# processes that wait for them, a loop device, and a disk of another server.
. ./common.sh

truncate -s 16M looped.img
losetup --find looped.img
sheave serve 'memory:?size=16M' --socket other.sock >other.log 2>&1 &
listens other.sock $!
nbd-client -unix other.sock /dev/nbd8 -b 512 >client.log 2>&1 || fail "$(cat client.log)"
mkfs.ext4 -q /dev/nbd8
mkdir -p other
mount /dev/nbd8 other
start_daemon
for front in $(fronts); do
    truncate -s 64M $front.img
    device=$(sheave attach --front $front $front.img)
    mkfs.ext4 -q "$device"
    mkdir -p $front
    mount "$device" $front
done
kill_daemon
for front in $(fronts); do
    dd if=/dev/urandom of=$front/dirty bs=1M count=4 conv=fsync status=none &
    wait_for "a write by $front waits" is_blocked $!
done
fail 'on purpose'
