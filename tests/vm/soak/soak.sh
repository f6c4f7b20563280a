# Sourced by the soak tests after ../cases/common.sh.

# The guest is without it, and <() wants it.
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd

# A bash that sleeps without a process of its own: whoever measures must not need the CPU.
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never" || true; }

fail() {
    trap - ERR
    echo "FAILED: $*" >&2
    [ ! -f daemon.log ] || tail -n 40 daemon.log | sed 's/^/daemon: /' >&2
    dmesg | tail -n 25 | sed 's/^/kernel: /' >&2
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

# figures FILE: of the numbers in it, one a line, if there are any.
figures() {
    [ -s "$1" ] || { echo none && return; }
    sort -n "$1" | awk '{ v[NR] = $1 } END { print "median", v[int((NR + 1) / 2)], "worst", v[NR] }'
}

# kernel_is_well [PATTERN]: it has met no bug, of its own or of its server; nor what is named.
kernel_is_well() {
    local said
    said=$(dmesg | grep -E "BUG:|Oops|WARNING:|Call Trace|blocked for more than${1:+|$1}" || true)
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
