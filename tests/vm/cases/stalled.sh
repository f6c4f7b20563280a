#!/bin/bash
# A volume that does not answer hangs only its own users, and can be ended; a device whose
# connection dies, or that is ended by other means, is looked after.
. ./common.sh

# A part of it, or all, answers after an hour.
stalled="$PWD/disk.img?fault=any:delay=3600s:range=24M-48M"
dead="$PWD/dead.img?fault=any:delay=3600s"

# gone PID WHAT: it ends with an error, since its device is ended.
gone() {
    ended "$1" "$2"
    wait "$1" && fail "$2 was served" || true
}

for front in $(fronts); do
    truncate -s 64M disk.img other.img dead.img
    start_daemon
    device=$(sheave attach --front $front "$stalled")
    other=$(sheave attach --front $front other.img)
    # More than the connection and the slots of a queue take in.
    readers=()
    for number in 1 2 3; do
        fio --name=stall --filename="$device" --offset=24M --size=16M --direct=1 --bs=4k \
            --ioengine=libaio --iodepth=128 --rw=randwrite >stall.$number.log 2>&1 &
        readers+=($!)
    done
    dd if="$device" of=/dev/null bs=64k count=1 skip=500 iflag=direct >dd.log 2>&1 &
    readers+=($!)
    wait_for 'some of them wait' in_flight "$device" 4
    # Time for more of them, if there is any.
    pause 2
    # The others go on.
    dd if=/dev/urandom of="$other" bs=1M count=8 oflag=direct status=none
    expect 2 "$(sheave ls --json | grep -o '"device"' | wc -l)"
    refused 'is in use' timeout $patience_s sheave detach "$device"
    timeout $patience_s sheave detach --force "$device" || fail 'a stalled device cannot be ended'
    for reader in "${readers[@]}"; do gone "$reader" "who uses $device"; done
    expect "$other" "$(sheave ls --json | python3 -c 'import json, sys
for found in json.load(sys.stdin): print(found["device"])')"
    expect "${other#/dev/} " "$(connected)"
    # Its requests are in flight in the volume, which is said.
    refused 'has it open already' sheave attach --front $front disk.img

    # One that does not even answer while it is attached.
    sheave attach --front $front "$dead" >attach.log 2>&1 &
    waits=$!
    wait_for "$dead is listed" is_listed "$dead"
    timeout $patience_s sheave detach --force "$dead" || fail 'a dead device cannot be ended'
    ended $waits 'attach'

    # A killed daemon ends even then, and what was only half made is forgotten, unless its number had
    # been written down.
    sheave detach "$other"
    kill_daemon
    start_daemon
    sheave attach --front $front "$dead" >attach.log 2>&1 &
    waits=$!
    wait_for "$dead is listed" is_listed "$dead"
    kill_daemon
    ended $waits 'attach by a dead daemon'
    start_daemon
    timeout $patience_s sheave detach --force "$dead" 2>detach.log || grep -q neither detach.log ||
        fail "it cannot be ended: $(cat detach.log)"
    expect '' "$(connected)"

    # A detach that waits for the volume keeps a killed daemon neither from ending nor from being
    # followed by another.
    device=$(sheave attach --front $front "$stalled")
    dd if=/dev/zero of="$device" bs=64k count=1 seek=500 status=none &
    writer=$!
    wait_for 'the write waits' writes_wait "$device"
    sheave detach "$device" >detach.log 2>&1 &
    waits=$!
    pause 4
    kill_daemon
    ended $waits 'a detach by a dead daemon'
    start_daemon
    logged 'recovered volume='
    # Nor does it keep another from ending the device.
    sheave detach "$device" >detach.log 2>&1 &
    waits=$!
    pause 2
    timeout $patience_s sheave detach --force "$device" || fail 'it cannot be ended'
    ended $waits 'the first detach'
    ended $writer 'the writer'
    expect 'no devices' "$(sheave ls)"
    kill_daemon
    rm disk.img other.img dead.img
done

# A connection that dies is replaced, and no program sees an error.
truncate -s 64M disk.img
start_daemon
device=$(sheave attach --front nbd disk.img)
fio --name=load --filename="$device" --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw --bs=4k \
    --size=32M --time_based --runtime=15 --verify=crc32c --verify_fatal=1 --verify_backlog=64 \
    >fio.log 2>&1 &
load=$!
wait_for 'the load has begun' in_flight "$device" 1
python3 - "$daemon" <<'P'
import ctypes, fcntl, os, socket, sys
pid = int(sys.argv[1])
libc, pidfd_getfd = ctypes.CDLL(None, use_errno=True), 438
pidfd, cut = os.pidfd_open(pid), 0
for name in os.listdir(f'/proc/{pid}/fd'):
    if not os.readlink(f'/proc/{pid}/fd/{name}').startswith('socket:'):
        continue
    found = socket.socket(fileno=libc.syscall(pidfd_getfd, pidfd, int(name), 0))
    # Of all sockets, the device's is a stream without names, and one that waits.
    is_stream = found.family == socket.AF_UNIX and found.type == socket.SOCK_STREAM
    waits = not fcntl.fcntl(found, fcntl.F_GETFL) & os.O_NONBLOCK
    if is_stream and waits and not found.getsockname():
        found.shutdown(socket.SHUT_RDWR)
        cut += 1
assert cut == 1, cut
P
logged 'does not serve it any more'
logged 'recovered volume='
wait $load || fail "fio: $(cat fio.log)"
! grep -q 'I/O is suspended' daemon.log || fail 'it could not be served at once'
expect "$device" "$(sheave attach disk.img)"

# A device that is ended by other means is forgotten.
nbd-client -d "$device" >/dev/null
logged 'its device is gone; forgotten'
expect 'no devices' "$(sheave ls)"
expect 1 "$(ls /var/lib/sheave/devices | wc -l)"
sheave attach --front nbd disk.img >/dev/null
sheave detach disk.img
stop_daemon
