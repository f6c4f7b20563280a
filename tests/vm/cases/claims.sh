# Sourced by the cases of claims after common.sh: a node with a pool and a plugin, and a client that
# takes the steps of the sidecars and of kubelet (tests/src/bin/claim.rs).

# plugin_is_ready LOG: $plugin says so in its log.
plugin_is_ready() {
    grep -q ' ready ' "$1" && return
    ! has_ended $plugin || fail 'the plugin ended'
    return 1
}

start_plugin() {
    [ ! -f csi.log ] || cat csi.log >>csi.all
    sheave csi --mode all --node-id guest --endpoint "unix://$PWD/csi.sock" >csi.log 2>&1 &
    plugin=$!
    wait_for 'the plugin starts' plugin_is_ready csi.log
}

kill_plugin() {
    kill -9 $plugin
    ended $plugin 'a killed plugin'
    wait $plugin 2>/dev/null || true
}

# make_pool: a pool, and the configuration of a daemon that has it.
make_pool() {
    mkdir -p images
    printf '[pools.fast]\nurl = "file://%s"\n' "$PWD/images" >daemon.toml
}

start_node() {
    make_pool
    start_daemon --config daemon.toml
    start_plugin
}

stop_node() {
    kill $plugin
    ended $plugin 'the plugin'
    wait $plugin || fail "the plugin ended with $?"
    stop_daemon
    # The next case has another pool of this name.
    rm -r /var/lib/sheave/pools
}

fail() {
    echo "FAILED: $*" >&2
    local log
    for log in daemon csi docker; do
        [ ! -f $log.log ] || tail -n 60 $log.log | sed "s/^/$log: /" >&2
    done
    exit 1
}

# claim [OPTION...] STEP...: takes a step, as a claim of $kind.
claim() {
    ./claim --socket "$PWD/csi.sock" --dir "${kubelet:-$PWD}" --node guest --kind "$kind" "$@"
}

# device_of ID: the volume's device, if it has one.
device_of() {
    sheave ls --json | python3 -c 'import json, sys
for found in json.load(sys.stdin):
    if found.get("volume_id") == sys.argv[1]: print(found["device"])' "$1"
}

# mount_of PATH: the id of what is mounted there, see proc_pid_mountinfo(5).
mount_of() { awk -v at="$1" '$5 == at { print $1 }' /proc/self/mountinfo; }

# is_from_device: what the pod has is the volume's device, or mounted from it.
is_from_device() {
    if [ $kind = block ]; then
        expect "$(stat -L -c %Hr:%Lr "$device")" "$(stat -c %Hr:%Lr "$place")"
    else
        expect "$device $kind" "$(findmnt -no SOURCE,FSTYPE "$place" | tr -s ' ')"
    fi
}

# new_content: nothing was put on the volume.
new_content() {
    : >content
    content_sum=$(sha256sum <content)
    content_mib=0
    content_files=()
}

# put NAME MIB: writes that much behind all that was put, until it is on stable storage.
put() {
    head -c "$2M" /dev/urandom >random
    if [ $kind = block ]; then
        dd if=random of="$place" bs=1M seek=$content_mib oflag=direct conv=fsync,notrunc status=none
    else
        dd if=random of="$place/$1" bs=1M conv=fsync status=none
    fi
    cat random >>content
    content_sum=$(sha256sum <content)
    content_mib=$((content_mib + $2))
    content_files+=("$1")
}

# read_back WHERE: all that was put, not from the cache.
read_back() {
    local name
    if [ $kind = block ]; then
        dd if="$1" bs=1M count=$content_mib iflag=direct status=none
        return
    fi
    for name in "${content_files[@]}"; do
        dd if="$1/$name" bs=1M iflag=direct status=none || return 1
    done
}

# check [WHERE]: a pod reads what was put, or an image has it.
check() { expect "$content_sum" "$(read_back "${1:-$place}" | sha256sum)"; }

# nothing_left: no device, no mount, no state, no volume.
nothing_left() {
    expect 'no devices' "$(sheave ls)"
    expect '' "$(connected)"
    expect '' "$(grep -F " $PWD/" /proc/mounts || true)"
    expect '' "$(find /var/lib/sheave/node /var/lib/sheave/devices -name '*.json')"
    expect '' "$(find stage pods -mindepth 1 ! -path pods/one ! -path pods/two 2>/dev/null)"
    expect '' "$(find images -type f ! -name '.sheave*')"
}
