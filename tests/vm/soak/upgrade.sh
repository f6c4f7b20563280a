#!/bin/bash
# A daemon gives way to the next again and again under load on devices of all fronts at once: the
# same devices, no program sees an error, and no request takes long. ROUNDS=100, and OBJECTS=1 for
# object volumes instead of images.
. ./common.sh
. ./soak.sh

rounds=${ROUNDS:-100}
# What a request may take, in a machine's time.
stall_ms=200
[ -z "${OBJECTS:-}" ] || stall_ms=1000

# The next daemon, in the place of the one that runs.
take_over() {
    local old=$daemon
    cat daemon.log >>daemon.all
    sheave daemon --takeover >daemon.log 2>&1 &
    daemon=$!
    ended "$old" "round $round: the daemon that gives way"
    wait "$old" || fail "round $round: the daemon that gave way ended with $?"
    for front in $(fronts); do logged "recovered volume=\"$(volume "load.$front")"; done
    ! grep -q 'I/O is suspended' daemon.log || fail "round $round: a device had to wait"
}

slowdown=$(slowdown)
declare -A loaded
jobs=()
start_daemon
for front in $(fronts); do
    loaded[$front]=$(attached "$front" "load.$front" 64M)
done
make_file_systems
devices=$(sheave ls --json)

# loads: starts the load of all devices.
loads() {
    rm -f ended
    jobs=()
    for front in "${!loaded[@]}"; do
        load "${loaded[$front]}" 8 &
        jobs+=($!)
    done
}

# What a request takes while nothing happens.
loads
pause 5
finish 'a load'
before=
for front in $(fronts); do
    read -r ms _ _ < <(ended_loads "${loaded[$front]}")
    before+="$front $ms ms, "
done
rm -f done.*

begun=$SECONDS
loads
write_file_systems
for round in $(seq "$rounds"); do
    pause "$((RANDOM % 2)).$((RANDOM % 10))"
    alive "round $round: a load"
    take_over
    expect "$devices" "$(sheave ls --json)"
    [ $((round % 10)) -ne 0 ] || echo "round $round, $((SECONDS - begun)) s"
done
finish 'a load'

closing=
slow=
for front in $(fronts); do
    read -r ms requests errors < <(ended_loads "${loaded[$front]}")
    expect 0 "$errors"
    closing+="; $front: slowest request $ms ms, $requests requests, $errors errors"
    [ "$ms" -le $((stall_ms * slowdown)) ] || slow+=" $front"
    sheave detach "${loaded[$front]}"
done
check_file_systems
closing+="; $files"
nothing_left
stop_daemon
kernel_is_well 'I/O error'
closing+="; without upgrades: ${before%, }; a guest's time is $slowdown times longer"
[ -z "$slow" ] || fail "slow:$slow$closing"
echo "upgrade: $rounds upgrades in $((SECONDS - begun)) s$closing"
