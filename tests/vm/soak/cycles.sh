#!/bin/bash
# Volumes of all kinds are attached and detached by several at a time, while the daemon is killed
# now and then. Nothing is left behind. ROUNDS=1000
. ./common.sh
. ./soak.sh

rounds=${ROUNDS:-1000}
workers=4
# Cycles between two kills, about.
kill_every=30
# The last part of the cycles is without kills, and shows what one daemon keeps.
quiet=$((rounds / 5))
# What a daemon may have more of at the end.
more_files_max=2
more_threads_max=2
more_kib_max=4096

# persist WHAT COMMAND...: until it works. A daemon that has just died, or finds its devices, says
# so; anything else is wrong. What it prints is in `said`.
persist() {
    local what=$1 end=$((SECONDS + patience_s))
    shift
    while [ $SECONDS -lt $end ]; do
        ! said=$("$@" 2>"err.$worker") || return 0
        case $(cat "err.$worker") in
            *'no daemon at'* | *'the daemon'* | *'waits for its volume'* | *'transport error'* | \
                *'connection'* | *'stream'* | *'is in use'* | *'h2 protocol'*) ;;
            *'neither a device nor a volume'*)
                # An answer that was lost, or a volume in memory that was.
                [ "$(cat kills)" = "$kills_before" ] || return 0
                break
                ;;
            # Found by the next daemon, whose volume is gone.
            *'died with the daemon'*) [ "$(cat kills)" = "$kills_before" ] && break ;;
            *) break ;;
        esac
        pause 0.2
    done
    fail "$what: $(cat "err.$worker")"
}

# use DEVICE NUMBER: what is written to a file must be there, whatever happens to the daemon.
use() {
    if [ "$kind" = file ] && [ -z "$read_only" ]; then
        head -c 64k < <(yes "cycle $2") >"data.$worker"
        dd if="data.$worker" of="$1" bs=16k oflag=direct status=none || return 1
        dd if="$1" bs=16k count=4 iflag=direct status=none | cmp - "data.$worker" || return 1
    else
        dd if="$1" of=/dev/null bs=16k count=4 iflag=direct status=none || return 1
    fi
}

cycle() {
    local kinds=(file file memory null) all front options=()
    all=($(fronts))
    kind=${kinds[RANDOM % 4]}
    front=${all[RANDOM % ${#all[@]}]}
    read_only=
    [ $((RANDOM % 4)) -ne 0 ] || read_only=--read-only
    case $kind in
        file) volume=$PWD/disk.$worker ;;
        *) volume="$kind:?size=$((worker + 4))M" ;;
    esac
    kills_before=$(cat kills)
    persist "attach $volume by $front" sheave attach --front "$front" $read_only "$volume"
    if ! use "$said" "$1" 2>"use.$worker"; then
        # What was in memory may be gone, with its device.
        [ "$kind" != file ] && [ "$(cat kills)" != "$kills_before" ] ||
            fail "$volume as $said: $(cat "use.$worker")"
    fi
    persist "detach $volume" sheave detach "$volume"
    echo "$kind $front $read_only" >>cycles
}

work() {
    local number
    worker=$1
    for number in $(seq "$2"); do cycle "$worker.$number"; done
}

# begin COUNT: so many cycles, by all workers.
begin() {
    local worker
    jobs=()
    for worker in $(seq $workers); do
        work "$worker" $(($1 / workers)) &
        jobs+=($!)
    done
}

done_cycles() { wc -l <cycles; }

# working: whether all workers are well, and some not done.
working() {
    local job left=()
    for job in "${jobs[@]}"; do
        if kill -0 "$job" 2>/dev/null; then
            left+=("$job")
        else
            wait "$job" || fail 'a worker failed'
        fi
    done
    jobs=("${left[@]}")
    [ ${#jobs[@]} -gt 0 ]
}

# has: what the daemon has now: files, threads, KiB.
has() {
    echo "$(ls "/proc/$daemon/fd" | wc -l)" "$(ls "/proc/$daemon/task" | wc -l)" \
        "$(awk '/^VmRSS:/ { print $2 }' "/proc/$daemon/status")"
}

# settle: waits until the daemon has no more threads to end, which wait ten seconds for calls.
settle() {
    local last=
    while [ "$last" != "$(ls "/proc/$daemon/task" | wc -l)" ]; do
        last=$(ls "/proc/$daemon/task" | wc -l)
        sleep 12
    done
}

: >cycles
echo 0 >kills
kills=0
for worker in $(seq $workers); do truncate -s 8M "disk.$worker"; done
begun=$SECONDS
start_daemon
begin $((rounds - quiet))
next=$kill_every
while working; do
    if [ "$(done_cycles)" -ge $next ]; then
        pause 0.$((RANDOM % 10))$((RANDOM % 10))
        kills=$((kills + 1))
        echo $kills >kills
        kill_daemon
        cat daemon.log >>daemon.all
        pause 0.$((RANDOM % 3))1
        start_daemon
        next=$(($(done_cycles) + kill_every / 2 + RANDOM % kill_every))
        echo "$(done_cycles) cycles, $kills kills, $((SECONDS - begun)) s"
    fi
    pause 0.1
done
begin $((quiet / 4 / workers * workers))
while working; do pause 0.1; done
settle
read -r files threads kib < <(has)
begin $((quiet - quiet / 4))
while working; do pause 0.1; done
settle
read -r files_now threads_now kib_now < <(has)
closing="$(done_cycles) cycles, $kills kills, $((SECONDS - begun)) s; "
closing+="files $files to $files_now, threads $threads to $threads_now, KiB $kib to $kib_now"
nothing_left
stop_daemon
# Reads of memory that is gone fail, so errors are none of its bugs.
kernel_is_well
[ $((files_now - files)) -le $more_files_max ] || fail "files are left open: $closing"
[ $((threads_now - threads)) -le $more_threads_max ] || fail "threads are left: $closing"
[ $((kib_now - kib)) -le $more_kib_max ] || fail "memory is left: $closing"
echo "cycles: $closing"
