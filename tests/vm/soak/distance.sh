#!/bin/bash
# A remote volume whose server is 50 ms away, over a network that loses one packet in a hundred each
# way. Reads scale with those in flight. What one connection writes is bound by TCP's window, which
# such a loss keeps at a dozen packets, so it scales with connections. No request takes 3 s.
# LOAD_SECONDS=20
. ./common.sh

seconds=${LOAD_SECONDS:-20}
modprobe sch_netem
ip netns add far
ip link add near type veth peer name far netns far
ip address add 10.9.0.1/24 dev near
ip netns exec far ip address add 10.9.0.2/24 dev far
ip link set near up
ip netns exec far ip link set far up
# Each way has half of the delay, and all of the loss.
tc qdisc add dev near root netem delay 25ms loss 1% limit 10000
ip netns exec far tc qdisc add dev far root netem delay 25ms loss 1% limit 10000

ip netns exec far sheave serve 'memory:?size=256M' --listen 10.9.0.2:10809 2>far.log &
far=$!
listening() { ip netns exec far ss -ltn | grep -q 10809; }
wait_for 'the server listens' listening
near=()
for connections in 1 4; do
    sheave serve "nbd://10.9.0.2/memory?connections=$connections" --socket near.$connections \
        2>near.log &
    near+=($!)
    wait_for 'the volume is there' test -S near.$connections
done

# load CONNECTIONS QD RW: prints requests a second and the slowest one in ms.
load() {
    sheave bench run "nbd+unix:///?socket=$PWD/near.$1" --bs 4k --qd "$2" --rw "$3" \
        --seconds "$seconds" --warmup 1 --json >load.json
    python3 -c 'import json
load = json.load(open("load.json"))
print(round(load["ops_per_s"], 1), round(load["all"]["max_us"] / 1000))'
}

# scales WHAT FEWER MORE AT-LEAST: the rate with more of something beside that with fewer.
scales() {
    echo "distance: $1: $(awk "BEGIN { printf \"%.1f\", $3 / $2 }") times"
    awk "BEGIN { exit !($3 >= $4 * $2) }" || fail "$1: $2/s, then $3/s, less than $4 times"
}

slowest_ms=0
for rw in read write; do
    for run in '1 1' '1 32' '4 32'; do
        read -r rate slowest < <(load $run $rw)
        echo "distance: $rw: connections and queue depth $run: $rate/s, slowest $slowest ms"
        rates+=("$rate")
        [ "$slowest" -le $slowest_ms ] || slowest_ms=$slowest
    done
done
scales 'QD32 beside QD1, reads' "${rates[0]}" "${rates[1]}" 16
scales 'QD32 beside QD1, writes over four connections' "${rates[3]}" "${rates[5]}" 12
scales 'four connections beside one, writes' "${rates[4]}" "${rates[5]}" 1.5
[ $slowest_ms -lt 3000 ] || fail "a request took $slowest_ms ms"
kill "${near[@]}" $far
echo "distance: slowest request $slowest_ms ms"
