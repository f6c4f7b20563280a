#!/bin/bash
# Fails on purpose, and leaves a process that no signal ends: it waits for a suspended disk.
. ./common.sh

truncate -s 64M disk.img
start_daemon
device=$(sheave attach disk.img)
echo "0 $(blockdev --getsz "$device") linear $device 0" | dmsetup create stuck
dmsetup suspend --nolockfs stuck
dd if=/dev/zero of=/dev/mapper/stuck bs=1M count=4 oflag=direct status=none &
wait_for 'a write that waits' is_blocked $!
kill_daemon
fail 'on purpose'
