# Sourced by the cases, which run as root in a guest.
set -euo pipefail

# Longest wait for anything that must come. A guest is emulated, on a machine with other work.
patience_s=300

# A sleep without a process of its own: a measurement must not need the CPU.
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never" || true; }

# The harness shows the end of this when the case fails.
if [ -n "${CASE_TRACE:-}" ]; then
    exec {trace}>"$CASE_TRACE"
    BASH_XTRACEFD=$trace
    PS4='+ $EPOCHREALTIME ${BASH_SOURCE##*/}:$LINENO: '
    set -x
fi

fail() {
    echo "FAILED: $*" >&2
    [ ! -f daemon.log ] || sed 's/^/daemon: /' daemon.log >&2
    exit 1
}

# wait_for WHAT COMMAND...: until the command succeeds.
wait_for() {
    local what=$1 end=$((SECONDS + patience_s))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || fail "$what: not within $patience_s s"
        pause 0.05
    done
}

# expect WANT GOT
expect() { [ "$1" = "$2" ] || fail "expected \"$1\", not \"$2\""; }

# refused TEXT COMMAND...: it must fail with one line that has TEXT in it. Sets `said` to the line.
refused() {
    local text=$1
    shift
    said=$("$@" 2>&1) && fail "$* was not refused"
    expect 1 "$(wc -l <<<"$said")"
    grep -qF -- "$text" <<<"$said" || fail "$*: said \"$said\", not \"$text\""
}

has_ended() { ! kill -0 "$1" 2>/dev/null; }

# ended PID WHAT: waits for the end of any process.
ended() { wait_for "$2 ends" has_ended "$1"; }

# The socket of a daemon that was killed may be there before.
is_ready() {
    grep -q ' ready ' daemon.log && return
    ! has_ended $daemon || fail 'the daemon ended'
    return 1
}

start_daemon() {
    sheave daemon "$@" >daemon.log 2>&1 &
    daemon=$!
    wait_for 'the daemon starts' is_ready
}

stop_daemon() {
    kill $daemon
    ended $daemon 'the daemon'
    wait $daemon || fail "the daemon ended with $?"
}

kill_daemon() {
    kill -9 $daemon
    ended $daemon 'a killed daemon'
    wait $daemon 2>/dev/null || true
}

# logged TEXT: waits until the daemon has said so.
logged() { wait_for "the daemon says \"$1\"" grep -qF -- "$1" daemon.log; }

# accepts SOCKET PID: the server listens there (flag __SO_ACCEPTCON in /proc/net/unix).
accepts() {
    grep -qE " 00010000 .*[ /]$1\$" /proc/net/unix && return
    ! has_ended "$2" || fail "the server of $1 ended"
    return 1
}

# listens SOCKET PID: waits for a server there.
listens() { wait_for "a server at $1" accepts "$1" "$2"; }

# in_flight DEVICE COUNT: whether the kernel waits for that many requests of it, or more.
in_flight() {
    local reads writes
    read -r reads writes <"/sys/block/${1#/dev/}/inflight"
    [ $((reads + writes)) -ge "$2" ]
}

# writes_wait DEVICE: whether the kernel waits for a write to it.
writes_wait() {
    local _ writes
    read -r _ writes <"/sys/block/${1#/dev/}/inflight"
    [ "$writes" -gt 0 ]
}

# is_blocked PID: no signal ends it now (state D of proc_pid_status(5)).
is_blocked() { grep -q '^State:.D' "/proc/$1/status"; }

# is_listed VOLUME: whether the daemon knows it.
is_listed() { sheave ls | grep -qF -- "$1"; }

# What this kernel can make devices with; ublk in full came with 6.5.
fronts() {
    local release
    release=$(uname -r)
    case $release in
        6.1.*) echo nbd ;;
        *) echo ublk nbd ;;
    esac
}

# grows FRONT: its devices can while they are used; ublk since Linux 6.16.
grows() { [ "$1" = nbd ] || [[ ! $(uname -r) =~ ^6\.12\. ]]; }

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

# has_partition DEVICE: waits for it.
has_partition() { wait_for "a partition of $1" [ -b "${1}p1" ]; }

# Devices that are connected.
connected() { ls -d /sys/block/nbd*/pid /sys/block/ublkb* 2>/dev/null | cut -d/ -f4 | tr '\n' ' '; }
