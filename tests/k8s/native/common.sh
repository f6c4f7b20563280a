# Sourced by ../common.sh if the node is native: made of namespaces of this machine.
state=$work/native
# All control groups of the node are below this one, which is in the caller's of each hierarchy.
group=sheave-$namespace

default_class=sheave
# What the chart's installation needs beside the program.
install_flags=(--values "$here/native/values.yaml" --post-renderer "$here/native/post-render")
for word in "$kbin/kubectl" "$run/post-render" "$(cat "$log/stand-in.log" 2>/dev/null || true)"; do
    install_flags+=(--post-renderer-args "$word")
done
# K8S_FORM=central installs what is in this directory, too.
form=$(cat "$run/form" 2>/dev/null) || form=${K8S_FORM:-}
[ -z "$form" ] || install_flags+=(--post-renderer-args "$here/native/$form")

on_node() {
    local limit=$1 pid
    pid=$(node_pid) || return 125
    timeout "$limit" nsenter --target "$pid" --mount --uts --ipc --net --pid --cgroup bash -c "$2"
}

# guest [--timeout S] COMMAND: a shell command on the node, with its output and its status.
guest() {
    local limit=60
    if [ "$1" = --timeout ]; then
        limit=$2
        shift 2
    fi
    on_node "$limit" "$*" </dev/null 2>&1
}
push() { on_node 200 "cat >'$2.new' && chmod 755 '$2.new' && mv '$2.new' '$2'" <"$1"; }

# PID 1 of the node, as this machine numbers it.
node_pid() {
    local pid
    pid=$(pid_of node) || return 1
    cut -d' ' -f1 "/proc/$pid/task/$pid/children" | grep .
}

# The node's control groups: those that it was started with, since a caller of `down` may be in others.
groups() {
    local controllers path
    if [ -e "$run/groups" ]; then
        cat "$run/groups"
        return
    fi
    while IFS=: read -r _ controllers path; do
        [ -z "$controllers" ] || echo "/sys/fs/cgroup/${controllers#name=}${path%/}/$group"
    done </proc/self/cgroup
}

pack_payload_native() {
    cp "$here/native/init-native" "$payload/"
    mkdir -p "$payload/images"
    ln "$work"/images/*.tar "$payload/images/"
}

connect_native() { inside ip addr add $host_ip/24 dev lo; }

boot_native() {
    local dir file stand_in=${SHEAVE_STAND_IN:-${binary%/*}/stand-in}
    [ -x "$stand_in" ] ||
        die "there is no $stand_in; run: cargo build -p sheave-tests --bin stand-in"
    [ -d /sys/fs/cgroup/memory ] || die 'a native node wants control groups of version 1'
    mkdir -p "$state/tmp"
    echo "$form" >"$run/form"
    groups >"$run/groups.new"
    mv "$run/groups.new" "$run/groups"
    # What serves the node's devices outlives the node, as a kernel does.
    start stand-in unshare --mount "$stand_in" "$state/tmp"
    wait_until 20 'the stand-in for a kernel' grep -q . "$log/stand-in.log"
    inside ip addr add $guest_ip/24 dev lo
    for dir in $(groups); do
        mkdir -p "$dir"
        # As much as its processes would get beside those of this machine.
        [ ! -e "$dir/cpu.shares" ] || echo 8192 >"$dir/cpu.shares"
        # A new group has no CPUs and no memory.
        for file in cpuset.cpus cpuset.mems; do
            [ ! -e "$dir/$file" ] || cat "$dir/../$file" >"$dir/$file"
        done
    done
    (
        for dir in $(groups); do echo $BASHPID >"$dir/cgroup.procs"; done
        start node unshare --mount --pid --fork --kill-child --uts --ipc --cgroup \
            "$here/native/node" "$state" "$work/payload" "$work/rootfs" "$(cat "$log/stand-in.log")"
    )
}

wait_for_native() { wait_until 60 'the node' guest true; }

# What is left when the node has ended. Some of its processes waited for their devices.
clean_native() {
    local dir
    has_ended() { ! cat $(groups | sed 's|$|/cgroup.procs|') 2>/dev/null | grep -q .; }
    wait_until 60 'the end of the node' has_ended
    for dir in $(groups); do
        [ ! -d "$dir" ] || find "$dir" -depth -type d -exec rmdir {} \;
    done
    rm -rf --one-file-system "$state" "$work/payload"
}
