#!/bin/bash
# The disk below a volume is slow, or fails, while daemons come and go: what is written later stays, and
# what is lost is not forgotten.
. ./common.sh

# disk_below RULE: /dev/nbd8, which does that to the first write to its second MiB.
disk_below() {
    rm -f below.sock
    sheave serve "memory:?size=16M&fault=write:$1:count=1:range=1M-2M" --socket below.sock \
        >below.log 2>&1 &
    below=$!
    listens below.sock $below
    nbd-client -unix below.sock /dev/nbd8 -b 512 >client.log 2>&1 || fail "$(cat client.log)"
}

end_disk_below() {
    nbd-client -d /dev/nbd8 >/dev/null
    kill $below
    ended $below 'the disk below'
    wait $below || fail "the disk below ended with $?"
}

# block FILE [OPTION...]: writes its 4 KiB to the second MiB.
block() {
    local file=$1
    shift
    dd if="$file" of="$device" bs=4k seek=256 count=1 oflag=direct status=none "$@"
}

has() {
    cmp -n 4096 -i 0:1M "$1" "$device" || fail "$2"
}

for name in first second; do head -c 4096 /dev/urandom >$name; done
for front in $(fronts); do
    # What the end of a daemon and the start of the next one take here.
    start_daemon
    begun=$SECONDS
    kill_daemon
    start_daemon
    took_s=$((SECONDS - begun + 1))
    kill_daemon
    delay_s=$((took_s * 4 > 15 ? took_s * 4 : 15))

    # A write of a daemon that is dead is still on its way to the disk when the next one starts.
    disk_below delay=${delay_s}s
    start_daemon
    device=$(sheave attach --front $front '/dev/nbd8?direct=true')
    block first &
    writer=$!
    wait_for 'the write is on its way' writes_wait nbd8
    kill_daemon
    start_daemon
    logged 'I/O is suspended'
    logged recovered
    wait $writer || fail 'the first write failed'
    block second conv=fsync
    has second 'an old write came later'
    sleep $((delay_s + 5))
    has second 'an old write came much later'
    sheave detach "$device"
    stop_daemon
    end_disk_below

    # Data is lost, which the next daemon would not know.
    disk_below error=EIO
    start_daemon
    device=$(sheave attach --front $front /dev/nbd8)
    block first
    ! sync "$device" 2>sync.log || fail 'a lost write was told as written'
    refused 'has lost data' sheave daemon --takeover
    ! sync "$device" 2>sync.log || fail 'a lost write was forgotten'
    sheave detach --force "$device"
    stop_daemon
    end_disk_below
done
