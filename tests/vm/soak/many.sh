#!/bin/bash
# Many devices at once, half of them of each front, and all of them recovered after a kill.
# DEVICES=200
. ./common.sh
. ./soak.sh

devices=${DEVICES:-200}
# Of an idle daemon, in parts of a thousand of a CPU.
idle_limit_permille=20
idle_s=20

# pattern NUMBER: a megabyte that no other device has.
pattern() { head -c 1M < <(yes "what is on device $1"); }

write_all() {
    local number
    for number in "${!paths[@]}"; do
        pattern "$number" >pattern
        dd if=pattern of="${paths[$number]}" bs=64k oflag=direct status=none
    done
}

read_all() {
    local number
    for number in "${!paths[@]}"; do
        dd if="${paths[$number]}" of=content bs=64k count=16 iflag=direct status=none
        pattern "$number" | cmp - content || fail "${paths[$number]} has other data"
    done
}

# ticks: CPU that the daemon has used, in hundredths of a second.
ticks() { sed 's/.*) //' "/proc/$daemon/stat" | awk '{ print $12 + $13 }'; }
memory_kib() { awk '/^VmRSS:/ { print $2 }' "/proc/$daemon/status"; }
files() { ls "/proc/$daemon/fd" | wc -l; }

recovered() { grep -c ' recovered volume=' daemon.log || true; }

start_daemon
sheave attach 'null:?size=1G' >/dev/null
sheave detach 'null:?size=1G'
declare -A spent_ms
paths=()
for number in $(seq "$devices"); do
    [ $((number % 2)) -eq 0 ] && front=nbd || front=$(fronts | cut -d' ' -f1)
    truncate -s 4M "disk.$number"
    from_ms=$(now_ms)
    paths[number]=$(sheave attach --front "$front" "disk.$number")
    spent=$(($(now_ms) - from_ms))
    echo $spent >>"attach.$front"
    spent_ms[$front]=$((${spent_ms[$front]:-0} + spent))
done
expect "$devices" "$(sheave ls --json | grep -o '"device"' | wc -l)"
expect "$devices" "$(printf '%s\n' "${paths[@]}" | sort -u | wc -l)"
closing="attach:"
for front in "${!spent_ms[@]}"; do closing+=" $front $(figures "attach.$front") ms,"; done
echo "$devices devices, $closing"

write_all
read_all
closing+=" $(memory_kib) KiB, $(files) files;"
sleep 5
used=$(ticks)
sleep $idle_s
idle_permille=$((($(ticks) - used) * 1000 / 100 / idle_s))
closing+=" idle $idle_permille/1000 of a CPU;"
echo "idle: $idle_permille/1000"

kill_daemon
from_ms=$(now_ms)
start_daemon
all_recovered() { [ "$(recovered)" -ge "$devices" ]; }
wait_for "all $devices devices are recovered" all_recovered
spent=$(($(now_ms) - from_ms))
closing+=" recovery of all $spent ms;"
echo "recovery: $spent ms"
read_all

from_ms=$(now_ms)
for number in "${!paths[@]}"; do sheave detach "${paths[$number]}"; done
closing+=" detach $((($(now_ms) - from_ms) / devices)) ms each"
nothing_left
stop_daemon
for number in "${!paths[@]}"; do
    pattern "$number" | cmp -n 1M - "disk.$number" || fail "disk.$number has other data"
done
kernel_is_well 'I/O error'
[ $idle_permille -le $idle_limit_permille ] || fail "an idle daemon takes CPU: $closing"
echo "many: $devices devices; $closing"
