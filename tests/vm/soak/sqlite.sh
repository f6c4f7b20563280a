#!/bin/bash
# Databases on a device: what was committed is there, after kills of the daemon, and in a copy of
# the image that is made while it is dead, as after a crash of the node. KILLS=20 for each of
# JOURNALS="WAL DELETE"
. ./common.sh
. ./soak.sh

kills=${KILLS:-20}
front=$(fronts | cut -d' ' -f1)
mkdir -p mounted crashed

# The copy is of a file system that was not unmounted: its journal is replayed.
check_crashed() {
    local last=$1 loop
    loop=$(losetup --find --show crash.img)
    mount "$loop" crashed
    python3 rows.py check crashed/rows.db "$last" >/dev/null ||
        fail "round $round: a crash loses rows"
    umount crashed
    e2fsck -fn "$loop" >fsck.log 2>&1 || fail "round $round: ext4: $(cat fsck.log)"
    losetup --detach "$loop"
    rm crash.img
}

closing=
start_daemon
for journal in ${JOURNALS:-WAL DELETE}; do
    rm -f ended
    truncate -s 512M rows.img
    device=$(sheave attach --front "$front" rows.img)
    mkfs.ext4 -q "$device"
    mount "$device" mounted
    python3 rows.py write mounted/rows.db $journal acknowledged &
    writer=$!
    wait_for 'a first commit' [ -s acknowledged ]
    for round in $(seq "$kills"); do
        pause "$((RANDOM % 3)).$((RANDOM % 10))"
        kill -0 $writer || fail "round $round: the writer has ended"
        kill_daemon
        pause 0.2
        # No commit returns now, and those that did are in the image.
        last=$(tail -n 1 acknowledged)
        cp --sparse=always rows.img crash.img
        expect "$last" "$(tail -n 1 acknowledged)"
        start_daemon
        check_crashed "$last"
        echo "$journal, kill $round: $last rows"
    done
    : >ended
    wait $writer || fail 'the writer failed'
    last=$(tail -n 1 acknowledged)
    python3 rows.py check mounted/rows.db "$last" >/dev/null || fail 'rows are lost'
    umount mounted
    clean ext4 "$device"
    sheave detach "$device"
    transactions=$(wc -l <acknowledged)
    closing+="; $journal: $transactions commits, $last rows, all there, $kills crash images whole"
    rm rows.img acknowledged
done
nothing_left
stop_daemon
kernel_is_well 'I/O error'
echo "sqlite: $front, $kills kills each$closing"
