#!/bin/bash
# A process that is a disk does not depend on disks: its threads, its memory, its mounts.
. ./common.sh

# Both halves of PF_IO_FLUSHER: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (linux/sched.h).
io_flusher=$((0x00080000 | 0x00100000))

# Flags of each thread of a process (proc_pid_stat(5)): of its own, and of its ring in the kernel.
flags() { sed 's/.*) //' /proc/"$1"/task/*/stat | cut -d' ' -f7; }

is_protected() {
    local found count=0
    for found in $(flags "$1"); do
        expect $io_flusher $((found & io_flusher))
        count=$((count + 1))
    done
    [ $count -ge 3 ] || fail "no more than $count threads"
    local locked_kib
    locked_kib=$(awk '/^VmLck:/ { print $2 }' "/proc/$1/status")
    # The program itself, at least.
    [ "$locked_kib" -ge 4096 ] || fail "$locked_kib KiB are locked"
    expect -1000 "$(cat "/proc/$1/oom_score_adj")"
    expect / "$(readlink "/proc/$1/cwd")"
    [ "$(readlink "/proc/$1/ns/mnt")" != "$(readlink /proc/1/ns/mnt)" ] || fail 'mounts are shared'
}

# mounted PROCESS DEVICE: where that process sees it mounted.
mounted() { awk -v device="$2" '$(NF - 1) == device { print $5 }' "/proc/$1/mountinfo"; }

# The daemon dies, which must not take it long, and is started again.
replace_daemon() {
    kill -9 $daemon
    ended $daemon 'a daemon that must not wait for its own device'
    wait $daemon 2>/dev/null || true
    start_daemon
    logged "recovered volume=\"$PWD/disk.img"
}

# second_serves COMMAND...
second_serves() {
    ! has_ended $second || fail "the second daemon ended: $(cat second.log)"
    "$@" sheave ls >ls.log 2>&1
}

# second_daemon COMMAND...: one with directories of its own, run by the command.
second_daemon() {
    local -x SHEAVE_RUNTIME_DIR=/run/second SHEAVE_STATE_DIR=/run/second
    mkdir -p /run/second
    chown nobody /run/second
    "$@" sheave daemon >second.log 2>&1 &
    second=$!
    wait_for 'the second daemon serves' second_serves "$@"
}

stop_second() {
    kill $second
    ended $second 'the second daemon'
    wait $second || fail "the second daemon ended with $?"
    rm -r /run/second
}

for found in $(flags $$); do expect 0 $((found & io_flusher)); done
mkdir -p before after
for front in $(fronts); do
    truncate -s 64M disk.img
    mkfs.ext4 -q -F disk.img
    start_daemon
    device=$(sheave attach --front $front disk.img)
    memory=$(sheave attach --front $front 'memory:?size=1G')
    dd if="$device" of=/dev/null bs=1M iflag=direct status=none
    is_protected $daemon
    rss_kib=$(awk '/^VmRSS:/ { print $2 }' /proc/$daemon/status)
    [ "$rss_kib" -lt 65536 ] || fail "$rss_kib KiB are there, though nothing is stored"
    expect 0 "$(grep -c WARN daemon.log || true)"
    sheave detach "$memory"

    # What is mounted after the start is seen, and need not be ended for the daemon to end.
    mount "$device" before
    expect "$PWD/before" "$(mounted $daemon "$device")"
    dd if=/dev/urandom of=before/dirty bs=1M count=8 status=none
    replace_daemon

    # What was mounted before is not held, and stays where it is.
    is_protected $daemon
    expect '' "$(mounted $daemon "$device")"
    expect "$PWD/before" "$(mounted 1 "$device")"
    cp before/dirty copy
    refused "$PWD/before" sheave detach "$device"
    umount before
    clean ext4 "$device"
    mount "$device" before
    expect "$PWD/before" "$(mounted $daemon "$device")"
    cmp before/dirty copy
    umount before
    expect '' "$(mounted $daemon "$device")"
    sheave detach "$device"

    # So it is with what lies on it by way of others. What is no device of ours stays visible.
    device=$(sheave attach --front $front disk.img)
    echo "0 $(blockdev --getsz "$device") linear $device 0" | dmsetup create stacked
    mount /dev/mapper/stacked before
    truncate -s 64M other.img
    mkfs.ext4 -q -F other.img
    mount -o loop other.img after
    replace_daemon
    expect '' "$(mounted $daemon /dev/mapper/stacked)"
    expect "$PWD/before" "$(mounted 1 /dev/mapper/stacked)"
    expect "$PWD/after" "$(mounted $daemon "$(findmnt -no SOURCE after)")"
    refused 'dm-0' sheave detach "$device"
    umount before
    dmsetup remove stacked
    sheave detach "$device"
    umount after

    # What was mounted after the start holds a volume, and can be unmounted when it does no more.
    mount -o loop other.img after
    truncate -s 32M after/disk.img
    device=$(sheave attach --front $front after/disk.img)
    mkfs.ext4 -q "$device"
    mount "$device" before
    umount before
    sheave detach "$device"
    umount after
    stop_daemon
done

# Where mounts are private, they would not follow.
start_daemon
second_daemon unshare --mount --propagation private
grep -q 'make-rshared' second.log || fail "it said nothing: $(cat second.log)"
stop_second

# What its unit allows it is enough for every front.
allowed=$(sed -n 's/^CapabilityBoundingSet=//p' deploy/systemd/sheave.service)
allowed=$(tr ' ' '\n' <<<"$allowed" | sed 's/CAP_/+/' | paste -sd, | tr '[:upper:]' '[:lower:]')
second_daemon setpriv --bounding-set "-all,$allowed"
[ "$(grep CapEff: /proc/$second/status)" != "$(grep CapEff: /proc/$daemon/status)" ] ||
    fail 'it was allowed everything'
for front in $(fronts); do
    device=$(SHEAVE_RUNTIME_DIR=/run/second sheave attach --front $front disk.img)
    is_protected $second
    mount "$device" before
    umount before
    SHEAVE_RUNTIME_DIR=/run/second sheave detach "$device"
done
expect 0 "$(grep -c WARN second.log || true)"
stop_second

# What a user may not have is said, each on a line, and the rest works.
second_daemon setpriv --reuid=65534 --clear-groups
for what in PR_SET_IO_FLUSHER LimitMEMLOCK oom_score_adj CAP_SYS_ADMIN; do
    expect 1 "$(grep WARN second.log | grep -c "$what")"
done
expect 4 "$(grep -c WARN second.log)"
stop_second
stop_daemon
