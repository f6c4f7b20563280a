# Sourced by the cases, which run as root in a guest.
set -euo pipefail

fail() {
    echo "FAILED: $*" >&2
    [ ! -f daemon.log ] || sed 's/^/daemon: /' daemon.log >&2
    exit 1
}

# expect WANT GOT
expect() { [ "$1" = "$2" ] || fail "expected \"$1\", not \"$2\""; }

# refused TEXT COMMAND...: it must fail with one line that has TEXT in it.
refused() {
    local text=$1 said
    shift
    said=$("$@" 2>&1) && fail "$* was not refused"
    expect 1 "$(wc -l <<<"$said")"
    grep -qF -- "$text" <<<"$said" || fail "$*: said \"$said\", not \"$text\""
}

start_daemon() {
    sheave daemon "$@" >daemon.log 2>&1 &
    daemon=$!
    trap 'kill $daemon 2>/dev/null || true' EXIT
    local tries
    for tries in $(seq 200); do
        # The socket may be one that a daemon has left.
        ! grep -q ' ready ' daemon.log || return 0
        kill -0 $daemon 2>/dev/null || break
        sleep 0.05
    done
    fail "the daemon did not start after $tries looks"
}

stop_daemon() {
    kill $daemon
    wait $daemon || fail "the daemon ended with $?"
}

kill_daemon() {
    kill -9 $daemon
    timeout 60 tail --pid=$daemon -f /dev/null || {
        waits >&2
        fail 'a killed daemon does not end'
    }
    wait $daemon 2>/dev/null || true
}

# Where the threads of the daemon wait in the kernel, and all those that cannot be interrupted.
waits() {
    local task
    for task in /proc/[0-9]*/task/*; do
        case $task in
            /proc/$daemon/*) ;;
            *) grep -q '^State:.D' "$task/status" 2>/dev/null || continue ;;
        esac
        echo "$task $(tr '\n' ' ' <"$task/comm") $(grep ^State "$task/status")"
        cat "$task/stack"
    done
}

# logged TEXT: waits until the daemon has said so.
logged() {
    local tries
    for tries in $(seq 600); do
        ! grep -qF -- "$1" daemon.log || return 0
        sleep 0.05
    done
    fail "the daemon did not say \"$1\" in $tries looks"
}

# What this kernel can make devices with; ublk in full came with 6.5.
fronts() {
    local release
    release=$(uname -r)
    case $release in
        6.1.*) echo nbd ;;
        *) echo ublk nbd ;;
    esac
}

# clean TYPE DEVICE: its file system has no errors.
clean() {
    case $1 in
        ext4) e2fsck -fn "$2" >fsck.log 2>&1 ;;
        xfs) xfs_repair -n "$2" >fsck.log 2>&1 ;;
        btrfs) btrfs check "$2" >fsck.log 2>&1 ;;
    esac || fail "$1: $(cat fsck.log)"
}

# partitioned FILE: a disk with one partition, from 1 MiB on.
partitioned() {
    truncate -s 64M "$1"
    python3 - "$1" <<'P'
import struct, sys
with open(sys.argv[1], 'r+b') as disk:
    disk.seek(446)
    disk.write(struct.pack('<B3xB3xII', 0, 0x83, 2048, 4096))
    disk.seek(510)
    disk.write(b'\x55\xaa')
P
}

# has_partition DEVICE: soon.
has_partition() {
    local tries
    for tries in $(seq 200); do
        [ ! -b "${1}p1" ] || return 0
        sleep 0.05
    done
    fail "$1 has no partition in $tries looks"
}

# Devices that are connected.
connected() { ls -d /sys/block/nbd*/pid /sys/block/ublkb* 2>/dev/null | cut -d/ -f4 | tr '\n' ' '; }
