#!/bin/bash
# A daemon that dies while it makes a device leaves nothing that its successor does not clean up, and
# the volume can be attached.
. ./common.sh

# has_begun COUNT: that many waits for stable storage.
has_begun() { [ "$(grep -c fsync calls)" -ge "$1" ]; }

# half_made FRONT SYNC: it dies at its first to fourth wait for stable storage: for the record of a
# device that is not made yet, and its directory; then for the record with the device's number.
half_made() {
    local tracer attaching
    # Both are killed long before the delay of ten minutes is over.
    strace -f -qq -e trace=fsync -e inject=fsync:delay_enter=600000000:when="$2" -o calls \
        sheave daemon --shards 1 >daemon.log 2>&1 &
    tracer=$!
    logged ready
    daemon=$(pgrep -x sheave)
    sheave attach --front "$1" half.img >attach.log 2>&1 &
    attaching=$!
    # Its delay begins behind what was there before.
    wait_for "wait $2 for stable storage" has_begun "$2"
    pause 0.5
    kill -9 $daemon
    # It holds what it delays, even if that is killed.
    kill -9 $tracer
    ! wait $attaching || fail "it was attached: $(cat attach.log)"
    wait
    rm /run/sheave/control.sock
    start_daemon
    sheave attach --front "$1" half.img >/dev/null
    sheave detach half.img
    expect 'no devices' "$(sheave ls)"
    expect '' "$(connected)"
    expect '' "$(ls /dev | grep ublkc || true)"
    expect lock "$(ls /var/lib/sheave/devices)"
    stop_daemon
}

truncate -s 4M half.img
for front in $(fronts); do
    for sync in 1 2 3 4; do half_made $front $sync; done
done
