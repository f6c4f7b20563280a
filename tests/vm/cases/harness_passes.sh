#!/bin/bash
# Uses a device of each front: after a case that failed, all must be as if there had been none.
. ./common.sh

start_daemon
expect 'no devices' "$(sheave ls)"
expect '' "$(connected)"
for front in $(fronts); do
    truncate -s 64M $front.img
    device=$(sheave attach --front $front $front.img)
    mkfs.ext4 -q "$device"
    mkdir -p $front
    mount "$device" $front
    umount $front
    clean ext4 "$device"
    sheave detach "$device"
done
stop_daemon
