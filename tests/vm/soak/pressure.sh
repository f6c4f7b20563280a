#!/bin/bash
# Memory is short: the daemon and the programs that dirty pages of its devices share a memory cgroup
# whose limit is less than what is written. Nothing hangs, and all data is right. MINUTES=10,
# LIMIT_MIB=160
. ./common.sh
. ./soak.sh

minutes=${MINUTES:-10}
limit_mib=${LIMIT_MIB:-160}
# How often is looked; the wait for any progress is that of all waits.
look_s=30
# Each file is longer than half the limit.
files=5
file_parts=$((limit_mib / 8))

hang() {
    local task
    for task in /proc/[0-9]*/task/[0-9]*; do
        grep -q '^State:.*D (disk' "$task/status" 2>/dev/null || continue
        echo "$task $(cat "$task/comm")" >&2
        sed 's/^/    /' "$task/stack" >&2 || true
    done
    fail "$*"
}

event() { awk -v name="$1" '$1 == name { print $2 }' "$group/memory.events"; }

# content BYTES: of a file: so many zeroes, and then parts that are all the same.
content() {
    local part
    head -c "$1" /dev/zero
    for part in $(seq $file_parts); do cat source; done
}

# dirty DIRECTORY: writes files without waiting for the disk, and reads what was written before.
dirty() {
    local round=0 number
    while [ ! -e ended ]; do
        number=$((RANDOM % files))
        content $((round % 4096 + 1)) |
            dd of="$1/file.$number" bs=64k iflag=fullblock status=none || return 1
        echo $((round % 4096 + 1)) >"$1.size.$number"
        round=$((round + 1))
        number=$((RANDOM % files))
        check "$1" $number || return 1
        echo $round >"$1.rounds"
    done
}

# check DIRECTORY NUMBER: that file, if there is one.
check() {
    [ -e "$1.size.$2" ] || return 0
    content "$(cat "$1.size.$2")" | cmp - "$1/file.$2" || return 1
}

sysctl -qw kernel.hung_task_timeout_secs=$patience_s 2>/dev/null ||
    echo 'this kernel does not report hung tasks'
group=/sys/fs/cgroup/soak
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir -p $group
head -c 4M /dev/urandom >source
echo $((limit_mib << 20)) >$group/memory.max
echo $BASHPID >$group/cgroup.procs

start_daemon
jobs=()
declare -A disks ended_before progressed
for front in $(fronts); do
    truncate -s 768M "disk.$front"
    disks[$front]=$(sheave attach --front "$front" "disk.$front")
    mkfs.ext4 -q "${disks[$front]}"
    mkdir -p "on.$front"
    mount "${disks[$front]}" "on.$front"
    dirty "on.$front" &
    jobs+=($!)
    ended_before[$front]=0
    progressed[$front]=$SECONDS
done
grep -q '/soak$' "/proc/$daemon/cgroup" || fail 'the daemon is not in the cgroup'

begun=$SECONDS
most_kib=0
while [ $((SECONDS - begun)) -lt $((minutes * 60)) ]; do
    sleep $look_s
    alive 'a writer'
    for front in "${!disks[@]}"; do
        completed "${disks[$front]}"
        if [ "$completed" -gt "${ended_before[$front]}" ]; then
            ended_before[$front]=$completed
            progressed[$front]=$SECONDS
        fi
        [ $((SECONDS - progressed[$front])) -lt $patience_s ] ||
            hang "no I/O on $front for $patience_s s"
    done
    timeout $patience_s sheave ls >/dev/null || hang 'the daemon does not answer'
    kib=$(awk '/^VmRSS:/ { print $2 }' "/proc/$daemon/status")
    [ "$kib" -le $most_kib ] || most_kib=$kib
    echo "$((SECONDS - begun)) s: $(cat on.*.rounds 2>/dev/null | tr '\n' ' ')files," \
        "$(($(cat $group/memory.current) >> 20)) MiB, max $(event max) times, daemon $kib KiB"
done
finish 'a writer'

closing=
for front in $(fronts); do
    timeout $patience_s umount "on.$front" || hang "umount of $front"
    clean ext4 "${disks[$front]}"
    mount "${disks[$front]}" "on.$front"
    for number in $(seq 0 $((files - 1))); do
        check "on.$front" "$number" || fail "$front: wrong data"
    done
    umount "on.$front"
    written=$(awk '{ print int($7 / 2048) }' "/sys/block/${disks[$front]#/dev/}/stat")
    closing+="; $front: $(cat "on.$front.rounds") files, $written MiB"
    sheave detach "${disks[$front]}"
done
nothing_left
stop_daemon
kernel_is_well 'I/O error'
expect 0 "$(event oom_kill)"
[ "$(event max)" -gt 0 ] || fail 'the limit was never reached'
echo "pressure: $minutes min with $limit_mib MiB, at the limit $(event max) times$closing;" \
    "daemon at most $most_kib KiB; no hang"
