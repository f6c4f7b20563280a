#!/bin/bash
# What a node must refuse: devices that its kernel cannot make, another program's device with the
# number of a claim's, another image at the path of a volume's, writes of readers.
. ./common.sh
. ./claims.sh

unloads() { rmmod "$1" 2>/dev/null; }
# without MODULE...: the kernel lacks them until `with`.
without() {
    local module
    for module; do
        echo "install $module /bin/false" >>/etc/modprobe.d/none.conf
        ! grep -q "^$module " /proc/modules || wait_for "$module is unloaded" unloads "$module"
    done
}
with() {
    rm -f /etc/modprobe.d/none.conf
    modprobe -qa nbd ublk_drv || true
}

# not_staged TEXT FRONT: its volume cannot be staged here, and nothing is left of the attempt.
not_staged() {
    local id sum
    id=$(claim create "$2" $((16 << 20)) "absent-$2")
    sum=$(sha256sum <images/*.img)
    refused "FailedPrecondition: " claim stage "$id"
    grep -qF -- "$1" <<<"$said" || fail "staging says \"$said\", not \"$1\""
    expect "$sum" "$(sha256sum <images/*.img)"
    expect '' "$(find /var/lib/sheave/node /var/lib/sheave/devices -name '*.json')"
    expect 'no devices' "$(sheave ls)"
    claim unstage "$id"
    claim delete "$id"
    nothing_left
}

# Makes another program's device with the number of `foreign`.
takes_number() { nbd-client -unix foreign.sock "$foreign" >client.log 2>&1; }

# staged_by PREFIX FRONT: its volume becomes such a device.
staged_by() {
    local id
    id=$(claim create "$2" $((16 << 20)) "there-$2")
    claim stage "$id"
    [[ $(device_of "$id") = $1* ]] || fail "$2: $(device_of "$id")"
    claim unstage "$id"
    claim delete "$id"
    nothing_left
}

trap 'rm -f /etc/modprobe.d/none.conf' EXIT
kind=ext4
start_node

# Without modules.
without nbd ublk_drv
not_staged 'neither ublk nor nbd works here' auto
not_staged 'modprobe nbd' nbd
[[ $(fronts) != *ublk* ]] || not_staged 'modprobe ublk_drv' ublk
with
if [[ $(fronts) = *ublk* ]]; then
    without ublk_drv
    staged_by /dev/nbd auto
    staged_by /dev/nbd nbd
    not_staged 'modprobe ublk_drv' ublk
    with
    without nbd
    staged_by /dev/ublkb auto
    staged_by /dev/ublkb ublk
    not_staged 'modprobe nbd' nbd
    with
fi

# A device that another program ends. While it is mounted, the kernel does not reuse its number; it
# can be unstaged, and staged anew.
kind=ext4
new_content
id=$(claim create nbd $((16 << 20)) ended-mounted)
claim stage "$id"
place=$(claim pod one "$id")
put first 1
sync -f "$place"
nbd-client -d "$(device_of "$id")" >/dev/null
! dd if=/dev/zero of="$place/second" bs=64k count=1 oflag=direct status=none 2>dd.log ||
    fail 'a device that has ended was written'
claim unpod one "$id"
claim unstage "$id"
expect '' "$(connected)"
claim stage "$id"
place=$(claim pod one "$id")
check
claim unpod one "$id"
claim unstage "$id"
claim delete "$id"
nothing_left

# Another program's device gets the number at once: no pod gets it, and it is not ended.
kind=block
head -c 16M /dev/urandom >foreign.own
cp foreign.own foreign.img
sheave serve foreign.img --socket foreign.sock >serve.log 2>&1 &
server=$!
listens foreign.sock $server
id=$(claim create nbd $((16 << 20)) ended)
claim stage "$id"
foreign=$(device_of "$id")
nbd-client -d "$foreign" >/dev/null
# The kernel may take a moment to release it.
wait_for "nbd-client takes $foreign" takes_number
refused 'FailedPrecondition' claim pod one "$id"
expect '' "$(ls pods/one)"
claim unstage "$id"
[ -e "/sys/block/${foreign#/dev/}/pid" ] || fail 'the device of another program was ended'
claim stage "$id"
device=$(device_of "$id")
[ "$device" != "$foreign" ] || fail 'the device of another program was taken'
place=$(claim pod one "$id")
is_from_device
head -c 1M /dev/urandom | dd of="$place" bs=64k oflag=direct iflag=fullblock status=none
cmp -n 16M foreign.own "$foreign"
claim unpod one "$id"
claim unstage "$id"
claim delete "$id"
nbd-client -d "$foreign" >/dev/null
kill $server
wait $server
nothing_left

for front in $(fronts); do
    # Another image at its path: the device waits for its own.
    kind=ext4
    new_content
    id=$(claim create $front $((16 << 20)) $front-replaced)
    claim stage "$id"
    place=$(claim pod one "$id")
    put first 2
    image=images/${id#*/}.img
    kill_daemon
    mv "$image" own.img
    cp own.img "$image"
    start_daemon --config daemon.toml
    logged 'I/O is suspended'
    dd if=/dev/urandom of="$place/second" bs=64k count=4 oflag=direct status=none &
    writer=$!
    pause 1
    ! has_ended $writer || fail 'a write has ended, and the image is not there'
    [[ $(claim condition one "$id") != healthy ]] || fail 'a device that waits is called healthy'
    cmp own.img "$image"
    mv own.img "$image"
    wait $writer || fail 'a write failed'
    check
    claim unpod one "$id"
    claim unstage "$id"

    # Readers: the device refuses writes, not only the mount, and a mount writes nothing to it.
    sum=$(sha256sum <"$image")
    reads() { claim --mode MULTI_NODE_READER_ONLY --read-only "$@"; }
    reads stage "$id"
    place=$(reads pod one "$id")
    reads pod two "$id" >/dev/null
    device=$(device_of "$id")
    expect 1 "$(blockdev --getro "$device")"
    ! touch "$place/third" 2>/dev/null || fail 'a reader wrote'
    ! mount -o remount,rw "$place" 2>/dev/null || ! touch "$place/third" 2>/dev/null ||
        fail 'a reader wrote after a remount'
    ! dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct status=none 2>/dev/null ||
        fail 'the device of a reader was written'
    check
    reads unpod one "$id"
    reads unpod two "$id"
    reads unstage "$id"
    expect "$sum" "$(sha256sum <"$image")"

    # Several writers of one node, as the mode allows.
    several() { claim --mode SINGLE_NODE_MULTI_WRITER "$@"; }
    several stage "$id"
    place=$(several pod one "$id")
    cp random "$(several pod two "$id")/shared"
    cmp random "$place/shared"
    several unpod one "$id"
    several unpod two "$id"
    several unstage "$id"
    claim delete "$id"
    nothing_left
done
stop_node
