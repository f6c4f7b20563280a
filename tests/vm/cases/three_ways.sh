#!/bin/bash
# The same workload on a volume that a container gets by CSI, FlexVolume (with and without attach)
# and Docker's volume plugin, on devices of every front: write and fsync while the writer, the
# daemon and the plugin are killed, mount anew, fill to the last block, grow, check. What was
# fsynced is there at each step, and the file system is the first one. WAYS='csi docker' for some.
. ./common.sh
. ./claims.sh
. ./ways.sh

ways=${WAYS:-csi flexvolume flexvolume_attach docker}
size_mib=48
grown_mib=80

# Writes numbered blocks until it is killed, each to stable storage before its number is in ACKED.
# With FILL it goes on until there is no room, with smaller blocks at the end, and then ends.
cat >writer.py <<'P'
import errno, hashlib, os, sys

def block(name, number, size):
    return hashlib.sha256(f"{name} {number}".encode()).digest() * (size // 32)

def write(path, acked, fill):
    name = os.path.basename(path)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    log = os.open(acked, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sizes = [1 << 20, os.statvfs(path).f_frsize] if fill else [16384]
    number = end = 0
    while sizes:
        try:
            wanted = block(name, number, sizes[0])
            # What there was no room for is not written half.
            assert os.pwrite(file, wanted, end) == len(wanted)
            os.fsync(file)
        except (OSError, AssertionError) as error:
            if not fill or getattr(error, "errno", errno.ENOSPC) != errno.ENOSPC:
                raise
            os.ftruncate(file, end)
            sizes.pop(0)
            continue
        end += len(wanted)
        os.write(log, f"{number} {len(wanted)}\n".encode())
        number += 1

def check(path, acked):
    name, count = os.path.basename(path), 0
    with open(path, "rb") as file:
        for line in open(acked):
            number, size = map(int, line.split())
            if file.read(size) != block(name, number, size):
                sys.exit(f"{path}: block {number} is wrong")
            count += 1
    if not count:
        sys.exit(f"{path}: nothing was written")

command, *files = sys.argv[1:]
check(*files) if command == "check" else write(*files, command == "fill")
P

opened() {
    ${way}_open
    device=$(device_of "$id")
    [[ $device = /dev/$front* ]] || fail "$way: the device is $device"
    is_from_device
    # The file system is not another one.
    local now
    now=$(blkid -p -s UUID -o value "$device")
    expect "${uuid:=$now}" "$now"
}

reopened() {
    ${way}_close
    expect '' "$(connected)"
    opened
}

# begin FILE: a writer.
begin() {
    file=$1
    python3 writer.py write "$place/$file" "acked.$file" 2>writer.log &
    writer=$!
    written+=("$file")
    goes_on
}
has_acked() {
    ! has_ended $writer || fail "a writer met an error: $(cat writer.log)"
    [ "$(wc -l <"acked.$file")" -ge "$1" ]
}
# goes_on: until the writer has written some more.
goes_on() {
    wait_for 'the writer writes' [ -s "acked.$file" ]
    wait_for 'the writer goes on' has_acked $(($(wc -l <"acked.$file") + 8))
}
kill_writer() {
    ! has_ended $writer || fail "a writer met an error: $(cat writer.log)"
    kill -9 $writer
    ended $writer 'a killed writer'
    wait $writer 2>/dev/null || true
}

# all_is_there: what was fsynced, as the device has it.
all_is_there() {
    local file
    echo 3 >/proc/sys/vm/drop_caches
    for file in "${written[@]}"; do
        python3 writer.py check "$place/$file" "acked.$file" || fail "$way $front: data is lost"
    done
}

restarted() {
    start_daemon --config daemon.toml
    start_way
    logged "recovered volume=\"$PWD/images/${id#*/}.img"
}

filled() {
    python3 writer.py fill "$place/fill" acked.fill || fail "$way $front: filling ended otherwise"
    written+=(fill)
    expect 0 "$(df --output=avail -k "$place" | tail -n 1 | tr -d ' ')"
    refused 'No space left on device' dd if=/dev/zero of="$place/more" bs=1k count=1 conv=fsync \
        status=none
    all_is_there
    reopened
    all_is_there
    rm "$place/more"
}

room() { df --output=size -BM "$place" | tail -n 1 | tr -dc 0-9; }

grown() {
    local before
    before=$(room)
    if [ $way = docker ] || ! grows $front; then
        # Docker does not ask for it. A device that cannot grow is made anew.
        (${way}_grow $grown_mib) >grow.log 2>&1 || grows $front ||
            grep -qE 'restart|anew|Linux 6.16' grow.log || fail "$way $front: $(cat grow.log)"
        reopened
    else
        ${way}_grow $grown_mib
    fi
    expect $((grown_mib << 20)) "$(blockdev --getsize64 "$device")"
    [ "$(room)" -ge $((before + 24)) ] || fail "$way $front: $(room) MiB after $before"
    begin grown
    kill_writer
    all_is_there
}

workload() {
    local from=$SECONDS
    name=${way//_/-}-$front
    written=() uuid=
    ${way}_make $size_mib
    opened
    begin first
    kill_way
    kill_daemon
    restarted
    goes_on
    kill_writer
    all_is_there
    # All at once; then the node is left as an orchestrator does that knows of no kill.
    begin second
    kill -9 $writer
    kill_way
    kill_daemon
    restarted
    # It may have waited for the device.
    wait $writer 2>/dev/null || true
    reopened
    all_is_there
    filled
    grown
    ${way}_close
    expect '' "$(connected)"
    clean $kind "images/${id#*/}.img"
    opened
    all_is_there
    ${way}_close
    ${way}_delete
    nothing_left
    rm acked.*
    echo "$way $front: $((SECONDS - from)) s"
}

make_pool
kind=ext4
for way in $ways; do
    start_daemon --config daemon.toml
    start_way
    for front in $(fronts); do workload; done
    stop_way
    stop_daemon
done
expect '' "$(find /var/lib/sheave/docker/{volumes,mounts} -mindepth 1 ! -name '.sheave*' ! -name lock)"
rm -r /var/lib/sheave/{pools,docker}
