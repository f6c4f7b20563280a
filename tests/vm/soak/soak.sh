# Sourced by the soak tests after ../cases/common.sh.

fail() {
    trap - ERR
    echo "FAILED: $*" >&2
    cat daemon.all daemon.log 2>/dev/null | grep -vE ' INFO (ready|recovered)' | tail -n 40 |
        sed 's/^/daemon: /' >&2 || true
    dmesg | grep -v 'Possible stuck request' | tail -n 40 | sed 's/^/kernel: /' >&2 || true
    exit 1
}
set -E
trap '[ $BASH_SUBSHELL -ne 0 ] || fail "line $LINENO: $BASH_COMMAND"' ERR

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# loop_ms: what this takes is compared between the guest and the machine that it is emulated on.
loop_ms() {
    local from_ms turn
    from_ms=$(now_ms)
    for ((turn = 0; turn < 300000; turn++)); do :; done
    echo $(($(now_ms) - from_ms))
}

# slowdown: how many times longer than the machine's the guest's time is; MACHINE_LOOP_MS is what
# loop_ms takes there.
slowdown() {
    local times=$(($(loop_ms) / ${MACHINE_LOOP_MS:-1000000}))
    echo $((times > 1 ? times : 1))
}

# completed DEVICE: sets `completed` to how many of its requests have ended, with success or not.
completed() {
    local fields
    read -ra fields <"/sys/block/${1#/dev/}/stat"
    completed=$((fields[0] + fields[4] + fields[11] + fields[15]))
}

# alive WHAT: none of the jobs has ended.
alive() {
    local job
    for job in "${jobs[@]}"; do kill -0 "$job" 2>/dev/null || fail "$1 has ended"; done
}

# finish WHAT: tells the jobs to end, and waits for them.
finish() {
    local job
    : >ended
    for job in "${jobs[@]}"; do wait "$job" || fail "$1 failed"; done
}

# load DEVICE DEPTH: writes, reads and compares until ./ended is there.
load() {
    local run=0 name=${1#/dev/}
    while [ ! -e ended ]; do
        run=$((run + 1))
        fio --name=load --filename="$1" --direct=1 --ioengine=libaio --iodepth="$2" --rw=randrw \
            --bs=4k --size=64M --time_based --runtime=20 --verify=crc32c --verify_fatal=1 \
            --verify_backlog=$(($2 * 32)) --output-format=json --output="fio.$name.$run" || return 1
        mv "fio.$name.$run" "done.$name.$run"
    done
}

# ended_loads DEVICE: their slowest request in milliseconds, how many there were, how many errors.
ended_loads() {
    cat done."${1#/dev/}".* | python3 -c '
import json, sys
text, at, slowest, ios, errors = sys.stdin.read(), 0, 0, 0, 0
decoder = json.JSONDecoder()
while text[at:].strip():
    at += len(text[at:]) - len(text[at:].lstrip())
    run, at = decoder.raw_decode(text, at)
    for job in run["jobs"]:
        errors += job["error"] != 0
        for way in (job["read"], job["write"]):
            ios += way["total_ios"]
            slowest = max(slowest, way["clat_ns"]["max"])
print(slowest // 1000000, ios, errors)'
}

# volume NAME: what attach calls it: an image, or, with OBJECTS=1, objects in a directory.
volume() { [ -z "${OBJECTS:-}" ] && echo "$PWD/$1" || echo "dir://$PWD/store/$1"; }

# attached FRONT NAME SIZE: the device of a new volume.
attached() {
    if [ -z "${OBJECTS:-}" ]; then
        truncate -s "$3" "$2"
    else
        mkdir -p store
        sheave volume create "$(volume "$2")" --size "$3" >/dev/null
    fi
    sheave attach --front "$1" "$(volume "$2")"
}

# File systems of all types, or those in `file_systems`, that are used while something happens: ext4 on each front, XFS on the
# first, btrfs on the last. They are called by their front and type.
make_file_systems() {
    local all=($(fronts)) name device
    [ -n "${file_systems:-}" ] ||
        file_systems=("${all[@]/%/.ext4}" "${all[0]}.xfs" "${all[-1]}.btrfs")
    for name in "${file_systems[@]}"; do
        device=$(attached "${name%.*}" "files.$name" 320M)
        "mkfs.${name#*.}" -q "$device"
        mkdir "on.$name"
        mount "$device" "on.$name"
    done
}

# Begins to write files to them, until ./ended is there.
write_file_systems() {
    local name
    for name in "${file_systems[@]}"; do
        write_files "on.$name" &
        jobs+=($!)
    done
}

# write_files DIRECTORY: files that are on stable storage, and what is in them.
write_files() {
    local count=0 name
    mkdir -p "$1.sums"
    while [ ! -e ended ]; do
        name=file.$((count % 48))
        dd if=/dev/urandom of="$1.source" bs=64k count=$((RANDOM % 32 + 1)) status=none
        rm -f "$1.sums/$name"
        dd if="$1.source" of="$1/$name" bs=64k conv=fsync status=none || return 1
        (cd "$1.sums" && sha256sum <"../$1.source" | sed "s|-|$1/$name|" >"$name")
        count=$((count + 1))
    done
    echo $count >"$1.count"
}

# They are whole, and have what was written; ends their devices. Sets `files` to how many there are.
check_file_systems() {
    local name device
    files=
    for name in "${file_systems[@]}"; do
        device=$(findmnt -no SOURCE "on.$name")
        umount "on.$name"
        clean "${name#*.}" "$device"
        mount "$device" "on.$name"
        cat "on.$name.sums"/file.* | sha256sum --quiet -c - || fail 'a file is not what was written'
        umount "on.$name"
        sheave detach "$device"
        files+="${files:+, }$(cat "on.$name.count") files on $name"
    done
}

# figures FILE: of the numbers in it, one a line, if there are any.
figures() {
    [ -s "$1" ] || { echo none && return; }
    sort -n "$1" | awk '{ v[NR] = $1 } END { print "median", v[int((NR + 1) / 2)], "worst", v[NR] }'
}

# Other cases of the same guest have made errors on purpose.
kernel_mark="the case $$ begins"
echo "$kernel_mark" >/dev/kmsg

# kernel_is_well [PATTERN]: since the case began it has met no bug, of its own or of its server; nor
# what is named.
kernel_is_well() {
    local said
    said=$(dmesg | tac | sed "/$kernel_mark/q" | tac |
        grep -E "BUG:|Oops|WARNING:|Call Trace|blocked for more than${1:+|$1}" || true)
    [ -z "$said" ] || fail "the kernel said: $said"
}

# nothing_left: no device, no record, no mount.
nothing_left() {
    expect 'no devices' "$(sheave ls)"
    expect '' "$(connected)"
    expect '' "$(ls -d /dev/ublkc[0-9]* 2>/dev/null | tr '\n' ' ')"
    expect '' "$(ls /var/lib/sheave/devices | grep -v '^lock$' | tr '\n' ' ')"
    expect '' "$(grep -E ' /dev/(nbd|ublkb)' /proc/mounts || true)"
}
