#!/bin/bash
# Runs a case in a guest that other cases use after it: limits its time, says of one that fails what
# it was doing, and cleans up. Ends with the status of the case, 124 when its time was over, or 125
# when the guest is of no use to other cases: tests/vm/run ends it then.
#
#   [CASE_TIMEOUT_S=1800] [CASE_GOES_ON=1] harness.sh CASE
#
# With CASE_GOES_ON a case that passes leaves all as it is for the next one.
set -uo pipefail

case=$1
# Several times what the longest case takes in a guest on a busy machine.
case_s=${CASE_TIMEOUT_S:-1800}
clean_s=300
# For a look at processes, which can hang as they do.
explain_s=60
# On the disk, for a guest that boots again.
known=/var/lib/harness
groups=/sys/fs/cgroup
# Of devices, and below the working directory, where pods of cases are, or a directory that is not
# lost in a reset.
mounts="^/dev/(nbd|ublkb|loop|mapper|dm-)|^[^ ]* ($PWD|/var/lib/claims)/"

# as_group NAME SECONDS COMMAND...: runs it in a control group of its own, with all that it starts.
as_group() {
    local group=$groups/$1 end=$((SECONDS + $2)) pid
    shift 2
    mkdir -p "$group"
    (
        echo $BASHPID >"$group/cgroup.procs"
        "$@"
    ) &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
        [ $SECONDS -lt $end ] || return 124
        sleep 0.1
    done
    wait $pid
}

# remove_group DIRECTORY: with those that a case has made in it, if no process is left in any.
remove_group() { find "$1" -depth -type d -exec rmdir {} + 2>/dev/null; }

# end_group NAME: kills what is left of it. Fails if the kernel does not let all of it end soon.
end_group() {
    local group=$groups/$1 tries
    [ -d "$group" ] || return 0
    echo 1 >"$group/cgroup.kill"
    for tries in $(seq 50); do
        ! remove_group "$group" || return 0
        sleep 0.1
    done
    return 1
}

processes() { find $groups/case -name cgroup.procs -exec cat {} +; }

# What a case must not leave behind.
findings() {
    grep -E "$mounts" /proc/mounts
    ls -d /sys/block/nbd*/pid /sys/block/loop*/loop /sys/block/{ublkb,dm-}* /dev/ublkc[0-9]*
    find /etc/{systemd/system,udev/rules.d,modprobe.d,sheave} \
        /var/lib/sheave/{devices,node,pools,docker,flexvolume} ! -type d ! -name '*lock'
    cat /etc/fstab
    systemctl list-units --all --no-legend --plain 'sheave*'
    [ ! -d $groups/case ] ||
        echo "processes: $(ps -o args= -p "$(processes | paste -sd,)")"
} 2>/dev/null

is_clean() { findings | cmp -s - $known; }

# soon_clean: what ends by itself has a moment for it.
soon_clean() {
    local tries
    for tries in $(seq 50); do
        remove_group $groups/case
        ! is_clean || return 0
        sleep 0.1
    done
    return 1
}

explain() {
    echo "--- $case: the last commands"
    tail -n 20 /run/case.trace
    echo '--- processes'
    ps --ppid 2 -p 2 --deselect -o pid,ppid,stat,wchan:20,etimes,args
    local task
    for task in /proc/[0-9]*/task/[0-9]*; do
        grep -q '^State:.D' "$task/status" || continue
        echo "--- $task waits: $(cat "$task/comm")"
        cat "$task/stack"
    done
    echo '--- kernel'
    dmesg | tail -n 30
} 2>/dev/null

# The way of the product: the next daemon finds the devices, and ends them. Then what lay on them.
clean() {
    local device at daemon
    systemctl kill --signal=KILL 'sheave*' 2>/dev/null
    systemctl stop 'sheave*' 2>/dev/null
    systemctl reset-failed 'sheave*' 2>/dev/null
    rm -f /run/sheave/control.sock
    sheave daemon >/run/clean.log 2>&1 &
    daemon=$!
    until grep -q ' ready ' /run/clean.log; do
        kill -0 $daemon 2>/dev/null || { cat /run/clean.log && break; }
        sleep 0.1
    done
    for device in $(sheave ls --json | grep -oE '/dev/[a-z0-9]+'); do
        sheave detach --force "$device"
    done
    # What was connected by others.
    for device in /sys/block/nbd*/pid; do
        [ ! -e "$device" ] || nbd-client -d "/dev/$(cut -d/ -f4 <<<"$device")" >/dev/null
    done
    grep -E "$mounts" /proc/mounts | tac |
        while read -r _ at _; do umount -l "$at"; done
    dmsetup remove_all 2>/dev/null
    losetup --detach-all
    kill $daemon
    wait $daemon
    rm -rf /var/lib/sheave/{devices,node}/*.json /var/lib/sheave/{pools,docker,flexvolume}
}

modprobe -qa loop nbd ublk_drv
if [ ! -e $known ]; then
    findings >$known.new
    sync $known.new
    mv $known.new $known
    sync ${known%/*}
fi
export CASE_TRACE=/run/case.trace
as_group case "$case_s" bash "$case"
status=$?
[ $status != 124 ] || echo "$case: the time is over ($case_s s)" >&2
[ $status != 0 ] || [ -z "${CASE_GOES_ON:-}" ] || exit 0
if [ $status = 0 ] && ! soon_clean; then
    echo "$case leaves behind:" >&2
    findings | diff $known - >&2
    status=1
fi
[ $status != 0 ] || exit 0

as_group explain $explain_s explain >&2
end_group explain
end_group case
as_group clean $clean_s clean >&2
end_group clean
# A process that waited for a device ends with the device.
if ! soon_clean; then
    echo "$case leaves what cannot be cleaned up:" >&2
    findings | diff $known - >&2
    exit 125
fi
exit $status
