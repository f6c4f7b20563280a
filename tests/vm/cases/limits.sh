#!/bin/bash
# Limits of a device change while it is used, and hold when another daemon serves it.
. ./common.sh

# load DEVICE: 40 requests of 4 KiB, one after another.
load() { dd if="$1" of=/dev/null bs=4k count=40 iflag=direct status=none; }

# is_limited DEVICE: whether the load takes as long as 20 requests a second do.
is_limited() {
    local begun=$EPOCHREALTIME
    load "$1"
    local us=$((${EPOCHREALTIME/./} - ${begun/./}))
    [ $us -gt 1500000 ]
}

# limits_of DEVICE: as the daemon says.
limits_of() {
    sheave ls --json | python3 -c 'import json, sys
for found in json.load(sys.stdin): print(found["limit_bps"], found["limit_iops"])'
}

for front in $(fronts); do
    truncate -s 64M disk.img
    start_daemon
    refused 'sheave ls' sheave volume set disk.img --limit-iops 5
    device=$(sheave attach --front $front disk.img)
    expect 'None None' "$(limits_of "$device")"
    load "$device"
    sheave volume set disk.img --limit-iops 20
    is_limited "$device" || fail 'a limit is not kept'
    sheave volume set "$device" --limit-bps 1G
    expect "$((1 << 30)) 20" "$(limits_of "$device")"
    # What waits for a low limit goes when it is lifted.
    sheave volume set disk.img --limit-iops 1
    load "$device" &
    loading=$!
    pause 2
    ! has_ended $loading || fail 'a lower limit is not kept'
    kill_daemon
    start_daemon
    logged recovered
    expect "$((1 << 30)) 1" "$(limits_of "$device")"
    pause 2
    ! has_ended $loading || fail 'a limit is lost with a daemon'
    sheave volume set disk.img --limit-iops none --limit-bps 0
    ended $loading 'the load'
    wait $loading || fail 'the load failed'
    expect 'None None' "$(limits_of "$device")"
    sheave detach "$device"
    stop_daemon
done
