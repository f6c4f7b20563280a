#!/bin/bash
# Object volumes as devices: the daemon is killed again and again under load. No program sees an
# error, and file systems stay clean. Then the node's journals are lost: what is in the store is a
# state that the file system had. ROUNDS=3
. ./common.sh
. ./soak.sh

rounds=${ROUNDS:-3}
OBJECTS=1
begun=$SECONDS

# Writes numbered files, each of which is on stable storage before the next one begins.
write_numbered() {
    local number=0
    while [ ! -e ended ]; do
        head -c $((RANDOM * 4 + 1)) /dev/urandom >source
        { sha256sum <source && cat source; } >"on.lost/$number.new"
        sync "on.lost/$number.new"
        mv "on.lost/$number.new" "on.lost/$number"
        sync on.lost
        number=$((number + 1))
    done
    echo $number >numbered
}

# check_numbered: those that are there are whole, and the first ones of all. Sets `there`.
check_numbered() {
    there=0
    while [ -e "on.lost/$there" ]; do
        expect "$(head -n 1 "on.lost/$there")" "$(tail -n +2 "on.lost/$there" | sha256sum)"
        there=$((there + 1))
    done
    expect $there "$(find on.lost -name '[0-9]*' ! -name '*.new' | wc -l)"
}

all=($(fronts))
file_systems=("${all[0]}.ext4" "${all[-1]}.xfs")
declare -A loaded
jobs=()
start_daemon
for front in "${all[@]}"; do loaded[$front]=$(attached "$front" "load.$front" 64M); done
make_file_systems
for front in "${all[@]}"; do
    load "${loaded[$front]}" 8 &
    jobs+=($!)
done
write_file_systems
for round in $(seq "$rounds"); do
    pause "$((RANDOM % 3 + 1)).$((RANDOM % 10))"
    alive "round $round: a load"
    kill_daemon
    cat daemon.log >>daemon.all
    start_daemon
    for front in "${all[@]}"; do logged "recovered volume=\"$(volume "load.$front")\""; done
    [ $((round % 10)) -ne 0 ] || echo "round $round, $((SECONDS - begun)) s, $(df -m . | tail -n 1)"
done
finish 'a load'
closing=
for front in "${all[@]}"; do
    read -r slowest requests errors < <(ended_loads "${loaded[$front]}")
    expect 0 "$errors"
    sheave detach "${loaded[$front]}"
    closing+="; $front: $requests requests, slowest $slowest ms, $errors errors"
done
check_file_systems
closing+="; $files"

# What a lost node leaves behind: the store as it is when a daemon is killed.
rm ended
device=$(attached "${all[0]}" lost 64M)
mkfs.ext4 -q "$device"
mkdir on.lost
mount "$device" on.lost
write_numbered &
jobs=($!)
# Objects are made after some ten seconds; so there are files in the store, and others behind.
pause 25
kill_daemon
cp -a store/lost left
start_daemon
finish 'a writer'
check_numbered
expect "$(cat numbered)" $there
umount on.lost
clean ext4 "$device"
sheave detach "$device"
rm -r /var/lib/sheave/volumes
refused 'is open on node' sheave attach "dir://$PWD/left"
device=$(sheave attach --take-over "dir://$PWD/left")
mount "$device" on.lost
check_numbered
[ $there -gt 0 ] || fail 'nothing of what was written is in the store'
closing+="; $there of $(cat numbered) files in what a lost node has left"
umount on.lost
clean ext4 "$device"
sheave detach "$device"
stop_daemon
kernel_is_well 'I/O error'
echo "objects: $rounds kills in $((SECONDS - begun)) s$closing"
