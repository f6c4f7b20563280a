#!/bin/bash
# The daemon is killed again and again under load on devices of all fronts at once: no program sees
# an error, and I/O goes on soon after each start. ROUNDS=100, and OBJECTS=1 for object volumes
# instead of images.
. ./common.sh
. ./soak.sh

rounds=${ROUNDS:-100}
# What the first request after a start may take: a second of a machine's time, and the timer that
# nbd has for what was in flight.
start_ms=1000
nbd_timer_ms=5000

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
        [ $((${EPOCHREALTIME/[.,]/} / 1000 - $1)) -lt $((patience_s * 1000)) ] ||
            fail "no I/O on$waits within $patience_s s"
        pause 0.005
    done
}

slowdown=$(slowdown)
declare -A loaded before done_ms
jobs=()
start_daemon
for front in $(fronts); do
    loaded[$front]=$(attached "$front" "load.$front" 64M)
done
make_file_systems
for front in "${!loaded[@]}"; do
    load "${loaded[$front]}" 16 &
    jobs+=($!)
done
write_file_systems

begun=$SECONDS
for round in $(seq "$rounds"); do
    pause "$((RANDOM % 3 + 1)).$((RANDOM % 10))"
    alive "round $round: a load"
    kill_daemon
    cat daemon.log >>daemon.all
    pause 0.$((RANDOM % 5))1
    for front in "${!loaded[@]}"; do
        completed "${loaded[$front]}"
        before[$front]=$completed
    done
    done_ms=()
    from_ms=$(now_ms)
    start_daemon
    resumed "$from_ms"
    # That of the start of another run of fio, once in a while, only makes it longer.
    for front in "${!loaded[@]}"; do echo "${done_ms[$front]}" >>"resumed.$front"; done
    [ $((round % 10)) -ne 0 ] || echo "round $round, $((SECONDS - begun)) s"
done
finish 'a load'

closing=
for front in $(fronts); do
    read -r _ requests errors < <(ended_loads "${loaded[$front]}")
    expect 0 "$errors"
    sheave detach "${loaded[$front]}"
    closing+="; $front: $(figures "resumed.$front") ms, $requests requests, $errors errors"
done
check_file_systems
closing+="; $files"
nothing_left
stop_daemon
kernel_is_well 'I/O error'
for front in $(fronts); do
    worst=$(sort -n "resumed.$front" | tail -n 1)
    limit=$((start_ms * slowdown))
    [ $front = ublk ] || limit=$((limit + nbd_timer_ms))
    [ "$worst" -le $limit ] || fail "$front went on after $worst ms$closing"
done
echo "kill: $rounds kills in $((SECONDS - begun)) s$closing; a guest's time is $slowdown times longer"
