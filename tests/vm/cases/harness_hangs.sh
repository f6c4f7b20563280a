#!/bin/bash
# Hangs on purpose: a process waits for a suspended disk, and no signal ends it.
. ./common.sh

truncate -s 64M disk.img
start_daemon
device=$(sheave attach disk.img)
echo "0 $(blockdev --getsz "$device") linear $device 0" | dmsetup create stuck
mkfs.ext4 -q /dev/mapper/stuck
mkdir -p mounted
mount /dev/mapper/stuck mounted
dmsetup suspend --nolockfs stuck
kill_daemon
dd if=/dev/zero of=mounted/file bs=1M count=4 oflag=direct status=none
