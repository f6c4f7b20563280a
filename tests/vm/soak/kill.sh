#!/bin/bash
# The daemon is killed again and again under load on devices of all fronts at once: nobody sees an
# error, and I/O goes on soon after each start. ROUNDS=100
. ./common.sh
. ./soak.sh

rounds=${ROUNDS:-100}
# What the first request after a start may take: a second of a machine's time, and the timer that
# nbd has for what was in flight.
start_ms=1000
nbd_timer_ms=5000
# How long is looked.
resume_max_ms=30000

# write_files DIRECTORY: files that are on stable storage, and what is in them.
write_files() {
    local count=0 name
    mkdir -p "$1.sums"
    while [ ! -e ended ]; do
        name=file.$((count % 48))
        dd if=/dev/urandom of="$1.source" bs=64k count=$((RANDOM % 32 + 1)) status=none
        rm -f "$1.sums/$name"
        dd if="$1.source" of="$1/$name" bs=64k conv=fsync status=none || return 1
        (cd "$1.sums" && sha256sum <"../$1.source" | sed "s|-|$1/$name|" >"$name")
        count=$((count + 1))
    done
    echo $count >"$1.count"
}

# resumed BEGUN_MS: waits until each loaded device has ended a request, and notes when.
resumed() {
    local front waits
    while :; do
        waits=
        for front in "${!loaded[@]}"; do
            [ -z "${done_ms[$front]:-}" ] || continue
            completed "${loaded[$front]}"
            if [ "$completed" -ne "${before[$front]}" ]; then
                done_ms[$front]=$((${EPOCHREALTIME/[.,]/} / 1000 - $1))
            else
                waits+=" $front"
            fi
        done
        [ -n "$waits" ] || return 0
        [ $((${EPOCHREALTIME/[.,]/} / 1000 - $1)) -lt $resume_max_ms ] ||
            fail "no I/O on$waits within $resume_max_ms ms"
        pause 0.005
    done
}

slowdown=$(slowdown)
declare -A loaded before done_ms in_flight
jobs=()
start_daemon
for front in $(fronts); do
    truncate -s 64M "load.$front"
    truncate -s 256M "files.$front"
    loaded[$front]=$(sheave attach --front "$front" "load.$front")
    disk=$(sheave attach --front "$front" "files.$front")
    mkfs.ext4 -q "$disk"
    mkdir "on.$front"
    mount "$disk" "on.$front"
done
for front in "${!loaded[@]}"; do
    load "${loaded[$front]}" 16 &
    jobs+=($!)
    write_files "on.$front" &
    jobs+=($!)
done

begun=$SECONDS
for round in $(seq "$rounds"); do
    pause "$((RANDOM % 3 + 1)).$((RANDOM % 10))"
    alive "round $round: a load"
    kill_daemon
    pause 0.$((RANDOM % 5))1
    for front in "${!loaded[@]}"; do
        completed "${loaded[$front]}"
        before[$front]=$completed
        # Between two runs of fio there is nothing that could go on.
        read -r reads writes <"/sys/block/${loaded[$front]#/dev/}/inflight"
        in_flight[$front]=$((reads + writes))
    done
    done_ms=()
    from_ms=$(now_ms)
    start_daemon
    resumed "$from_ms"
    for front in "${!loaded[@]}"; do
        [ "${in_flight[$front]}" = 0 ] || echo "${done_ms[$front]}" >>"resumed.$front"
    done
    [ $((round % 10)) -ne 0 ] || echo "round $round, $((SECONDS - begun)) s"
done
finish 'a load'

closing=
for front in $(fronts); do
    read -r _ requests errors < <(ended_loads "${loaded[$front]}")
    expect 0 "$errors"
    disk=$(findmnt -no SOURCE "on.$front")
    umount "on.$front"
    clean ext4 "$disk"
    mount "$disk" "on.$front"
    cat "on.$front.sums"/file.* | sha256sum --quiet -c - || fail 'a file is not what was written'
    umount "on.$front"
    sheave detach "load.$front"
    sheave detach "files.$front"
    closing+="; $front: $(figures "resumed.$front") ms, $requests requests, $errors errors,"
    closing+=" $(cat "on.$front.count") files"
done
nothing_left
stop_daemon
kernel_is_well 'I/O error'
for front in $(fronts); do
    # No request may have been in flight whenever it was killed.
    [ -s "resumed.$front" ] || continue
    worst=$(sort -n "resumed.$front" | tail -n 1)
    limit=$((start_ms * slowdown))
    [ $front = ublk ] || limit=$((limit + nbd_timer_ms))
    [ "$worst" -le $limit ] || fail "$front went on after $worst ms$closing"
done
echo "kill: $rounds kills in $((SECONDS - begun)) s$closing; a guest's time is $slowdown times longer"
