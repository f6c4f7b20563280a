#!/bin/bash
# The log of a daemon is best effort: its devices answer when the reader of the log has ended, when
# its disk is full, and when the reader does not read. Neither delays the end.
. ./common.sh

# answers DEVICE: it reads and writes.
answers() {
    timeout $patience_s dd if=/dev/zero of="$1" bs=4096 count=1 oflag=direct status=none || fail "$1: write"
    timeout $patience_s dd if="$1" of=/dev/null bs=4096 count=1 iflag=direct status=none || fail "$1: read"
}

has_daemon() {
    ! has_ended $daemon || fail 'the daemon ended'
    sheave ls >/dev/null 2>&1
}

# start_with LOG: a daemon whose log cannot be looked at.
start_with() {
    SHEAVE_LOG=debug sheave daemon 2>"$1" &
    daemon=$!
    wait_for 'the daemon starts' has_daemon
}

# works: devices come, answer and go, each with lines of the log, and so does the daemon.
works() {
    local device
    for _ in 1 2 3; do
        device=$(sheave attach a.img)
        answers "$device"
        kill -USR1 $daemon
        sheave detach a.img
    done
    stop_daemon
}

# is_full PIPE: nothing can be written to it now.
is_full() {
    python3 - "$1" <<'P'
import os, sys
pipe = os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
try:
    os.write(pipe, b'x')
    sys.exit(1)
except BlockingIOError:
    pass
P
}

truncate -s 64M a.img
mkfifo pipe

# Its reader has ended, after a line.
head -1 pipe >/dev/null &
start_with pipe
works

start_with /dev/full
works

# Its reader does not read, and the pipe is full.
sleep infinity <pipe &
reader=$!
yes >pipe &
filler=$!
wait_for 'the pipe is full' is_full pipe
start_with pipe
works
kill $filler $reader
