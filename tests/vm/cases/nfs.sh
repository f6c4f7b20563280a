#!/bin/bash
# A pool on NFS that two nodes share, with the kernel's own server and client: what keeps them
# apart, and what a node can do that has lost its lock.
. ./common.sh

modprobe -a nfsd nfsv4
root=$PWD

# The server, without its user space: what it would ask mountd for is put into its caches.
mkdir -p export /proc/fs/nfsd
mount -t tmpfs tmpfs export
mkdir export/images
mount -t nfsd nfsd /proc/fs/nfsd
ip link set lo up
ip netns add far
ip link add near type veth peer name far netns far
ip addr add 10.9.0.1/24 dev near
ip link set near up
ip -n far addr add 10.9.0.2/24 dev far
ip -n far link set far up
for address in 127.0.0.1 10.9.0.1 10.9.0.2; do
    echo "nfsd $address 2147483647 nodes" >/proc/net/rpc/auth.unix.ip/channel
done
# Read-write, without squashing, asynchronous, with the id 0: the root of all exports.
echo "nodes $root/export 2147483647 9234 65534 65534 0" >/proc/net/rpc/nfsd.export/channel
echo "nodes 1 \\x00000000 2147483647 $root/export" >/proc/net/rpc/nfsd.fh/channel
# Seconds: as short as the server lets them be.
echo 10 >/proc/fs/nfsd/nfsv4leasetime
echo 10 >/proc/fs/nfsd/nfsv4gracetime
echo '-2 -3 +4 +4.1 +4.2' >/proc/fs/nfsd/versions
echo 4 >/proc/fs/nfsd/threads

# Two clients: a network namespace has one of its own. A server tells clients by their hostnames: with
# one name each would end the locks of the other.
mkdir -p a b
mount -i -t nfs4 -o vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1 127.0.0.1:/ a
unshare --uts bash -c 'hostname far && exec nsenter --net=/run/netns/far mount -i -t nfs4 \
    -o vers=4.2,addr=10.9.0.1,clientaddr=10.9.0.2 10.9.0.1:/ b'
expect 2 "$(ls /proc/fs/nfsd/clients | wc -l)"
# Until the server gives locks.
touch a/probe
flock a/probe true
rm a/probe

# daemon_of NODE: with a room of its own.
daemon_of() {
    mkdir -p "node-$1"
    printf '[pools.shared]\nurl = "file://%s/images"\nshared = true\n' "$root/$1" >"node-$1/pools.toml"
    SHEAVE_RUNTIME_DIR=$root/node-$1 SHEAVE_STATE_DIR=$root/node-$1 \
        sheave daemon --config "node-$1/pools.toml" >"node-$1/log" 2>&1 &
    pids[$1]=$!
    wait_for "the daemon of $1 starts" grep -q ' ready ' "node-$1/log"
}
on() {
    local node=$1
    shift
    SHEAVE_RUNTIME_DIR=$root/node-$node sheave "$@"
}
declare -A pids

daemon_of a
daemon_of b
on a volume create shared/x --size 64M
device=$(on a attach shared/x)
refused 'end that use first' on b attach shared/x
refused 'has locked it' on b volume delete shared/x
dd if=/dev/urandom of=first bs=1M count=1 status=none
dd if=first of="$device" bs=1M oflag=direct conv=fsync status=none
on a detach shared/x
device=$(on b attach shared/x)
cmp -n 1048576 first "$device" || fail 'the other node reads something else'
refused 'end that use first' on a attach shared/x
on b detach shared/x

# A node that the server takes for dead: its lock goes to another, and its writes come to nothing.
device=$(on a attach shared/x)
dd if=first of="$device" bs=4k count=1 oflag=direct conv=fsync status=none
for client in /proc/fs/nfsd/clients/*; do
    grep -q '127.0.0.1' "$client/info" && echo expire >"$client/ctl"
done
takes_over() { device_b=$(on b attach shared/x 2>/dev/null); }
wait_for 'the other node has it' takes_over
dd if=/dev/zero of="$device_b" bs=1M count=1 oflag=direct conv=fsync status=none
dd if=first of="$device" bs=4k count=1 oflag=direct conv=fsync status=none 2>/dev/null &&
    fail 'a node that has lost its lock has written'
blockdev --flushbufs "$device_b"
cmp -n 1048576 /dev/zero "$device_b" || fail 'a write of the old node has arrived'
on b detach shared/x

# It comes back, and keeps its hands off.
kill -9 "${pids[a]}"
ended "${pids[a]}" 'the daemon of a'
daemon_of a
waits() { on a ls --json | grep -q 'has used it since'; }
wait_for 'the device of the old node waits' waits
on a detach --force shared/x
device=$(on a attach shared/x)
cmp -n 1048576 /dev/zero "$device" || fail 'the old node has written'
on a detach shared/x
on a volume delete shared/x

for node in a b; do
    kill "${pids[$node]}"
    ended "${pids[$node]}" "the daemon of $node"
done
umount a b
echo 0 >/proc/fs/nfsd/threads
umount /proc/fs/nfsd
umount export
ip netns del far
ip link del near 2>/dev/null || true
