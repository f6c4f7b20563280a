#!/bin/bash
# Plugin and daemon are killed, replaced, and ended and started, under programs that write to claims,
# and while other claims come and go: no program sees an error, and what was begun is finished.
# ROUNDS=2
. ./common.sh
. ./claims.sh

rounds=${ROUNDS:-2}
# The longest that a request may take while a daemon gives way to another or a plugin is replaced,
# on an emulated machine with other work. docs/performance.md has figures.
stall_max_ms=30000

# load WHAT FILE: begins to write and compare until ./ended is there.
load() {
    local run=0
    while [ ! -e ended ]; do
        run=$((run + 1))
        fio --name="$1" --filename="$2" --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw \
            --bs=4k --size=16M --time_based --runtime=10 --verify=crc32c --verify_fatal=1 \
            --verify_backlog=256 --output-format=json --output="fio.$1.$run" || return 1
    done
}

# ended_loads: ends the loads; they have seen no error. Sets `slowest_ms`.
ended_loads() {
    local job
    : >ended
    for job in "${loads[@]}"; do wait "$job" || fail "a load failed: $(cat fio.*)"; done
    slowest_ms=$(python3 - fio.* <<'P'
import json, sys
slowest = 0
for name in sys.argv[1:]:
    with open(name) as file:
        text = file.read()
    for job in json.loads(text[text.index('{'):])['jobs']:
        assert job['error'] == 0, text
        slowest = max(slowest, job['read']['clat_ns']['max'], job['write']['clat_ns']['max'])
print(slowest // 1000000)
P
    )
    rm -f ended fio.*
}

# start_loads KIND...: on the claims of these kinds.
start_loads() {
    local kind front what
    loads=()
    for kind; do
        for front in $(fronts); do
            what=$front.$kind
            load "$what" "${places[$what]}" &
            loads+=($!)
            wait_for 'the load has begun' in_flight "$(device_of "${ids[$what]}")" 1
        done
    done
}

# lives NAME: claims that come and go, until ./ended is there.
lives() {
    local count=0 id place front kind
    while [ ! -e ended ]; do
        for front in $(fronts); do
            kind=ext4
            count=$((count + 1))
            id=$(claim create $front $((16 << 20)) "$1-$count") || return 1
            claim stage "$id" || return 1
            place=$(claim pod one "$id") || return 1
            cp random "$place/random" || return 1
            cmp random "$place/random" || return 1
            claim unpod one "$id" || return 1
            claim unstage "$id" || return 1
            claim delete "$id" || return 1
        done
    done
    echo $count >lives
}

recovered() {
    local id
    for id in "${ids[@]}"; do logged "recovered volume=\"$PWD/images/${id#*/}.img"; done
}

head -c 2M /dev/urandom >random
start_node
declare -A ids places
for front in $(fronts); do
    for kind in ext4 block; do
        what=$front.$kind
        ids[$what]=$(claim create $front $((64 << 20)) "$what")
        claim stage "${ids[$what]}"
        places[$what]=$(claim pod one "${ids[$what]}")
        [ $kind = block ] || places[$what]+=/file
    done
done

start_loads ext4 block
lives churn &
loads+=($!)
for round in $(seq "$rounds"); do
    pause "$((RANDOM % 3)).$((RANDOM % 10))"
    kill_plugin
    start_plugin
    pause "$((RANDOM % 3)).$((RANDOM % 10))"
    kill_daemon
    cat daemon.log >>daemon.all
    start_daemon --config daemon.toml
    recovered
done
# Both at once.
kill -9 $plugin
kill_daemon
wait $plugin 2>/dev/null || true
start_daemon --config daemon.toml
start_plugin
recovered
ended_loads
echo "kills: longest request $slowest_ms ms, $(cat lives) claims meanwhile"

# What the orchestrator asks again changes nothing.
for what in "${!ids[@]}"; do
    kind=${what#*.}
    claim stage "${ids[$what]}"
    place=$(claim pod one "${ids[$what]}")
    [[ ${places[$what]} = "$place"* ]] || fail "$place, not ${places[$what]}"
    expect healthy "$(claim condition one "${ids[$what]}")"
done

# Upgrades: the next daemon takes over, the next plugin comes when its predecessor has ended.
start_loads ext4 block
for round in $(seq "$rounds"); do
    pause 1
    old=$daemon
    cat daemon.log >>daemon.all
    sheave daemon --config daemon.toml --takeover >daemon.log 2>&1 &
    daemon=$!
    ended "$old" 'the daemon that gives way'
    recovered
    ! grep -q 'I/O is suspended' daemon.log || fail 'a device had to wait'
    kill $plugin
    ended $plugin 'the plugin'
    wait $plugin || fail "the plugin ended with $?"
    start_plugin
done
ended_loads
echo "upgrades: longest request $slowest_ms ms"
[ "$slowest_ms" -le $stall_max_ms ] || fail "a request took $slowest_ms ms"

# A daemon's pod is deleted: SIGTERM, the end of its grace, later a start. Pods of raw claims have
# closed their devices for a moment, and open them when no daemon is there.
for front in $(fronts); do
    place=${places[$front.block]}
    head -c 1M /dev/urandom >"random.$front"
    dd if="random.$front" of="$place" bs=64k oflag=direct iflag=fullblock status=none
done
start_loads ext4
devices=$(connected)
kill $daemon
logged 'served on, until it is not used'
kill_daemon
cat daemon.log >>daemon.all
expect "$devices" "$(connected)"
readers=()
for front in $(fronts); do
    dd if="${places[$front.block]}" bs=64k count=16 iflag=direct status=none >"read.$front" &
    readers+=($!)
done
pause 1
for reader in "${readers[@]}"; do ! has_ended "$reader" || fail 'a read ended without a daemon'; done
start_daemon --config daemon.toml
recovered
for reader in "${readers[@]}"; do wait "$reader" || fail 'a read failed'; done
for front in $(fronts); do cmp "random.$front" "read.$front"; done
ended_loads
expect "$devices" "$(connected)"
echo "end and start: longest request $slowest_ms ms"

for what in "${!ids[@]}"; do
    kind=${what#*.}
    claim unpod one "${ids[$what]}"
    claim unstage "${ids[$what]}"
    [ $kind = block ] || clean $kind "images/${ids[$what]#*/}.img"
    claim delete "${ids[$what]}"
done
nothing_left
stop_node
