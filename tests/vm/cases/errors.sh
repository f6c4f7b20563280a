#!/bin/bash
# What cannot be done is said in one line, and nothing is torn down.
. ./common.sh

truncate -s 1M disk.img
refused 'start one: sheave daemon' sheave attach disk.img
refused 'start one: sheave daemon' sheave ls
start_daemon
refused 'another daemon listens' sheave daemon
device=$(sheave attach disk.img)
refused 'neither a device nor a volume' sheave detach /dev/vda
refused 'neither a device nor a volume' sheave detach /dev/nbd9
refused 'No such file' sheave attach missing.img
truncate -s 1000 odd.img
refused 'blocks of 512 bytes' sheave attach odd.img
: >empty.img
refused 'blocks of 512 bytes' sheave attach empty.img
expect "$device" "$(sheave attach disk.img)"

# Users other than root and the daemon's user are refused, whatever the socket's mode.
chmod 777 /run/sheave /run/sheave/control.sock
said=$(SHEAVE_RUNTIME_DIR=/run/sheave setpriv --reuid=65534 --clear-groups sheave ls 2>&1) &&
    fail 'a stranger was served'
grep -q 'only root' <<<"$said" || fail "a stranger was told: $said"
chmod 700 /run/sheave

# A device of another program is not ended.
sheave serve 'memory:?size=1M' --socket foreign.sock >serve.log 2>&1 &
server=$!
listens foreign.sock $server
nbd-client -unix foreign.sock /dev/nbd8 >client.log 2>&1 || fail "nbd-client: $(cat client.log)"
refused 'neither a device nor a volume' sheave detach /dev/nbd8
dd if=/dev/urandom of=random bs=64k count=16 status=none
dd if=random of=/dev/nbd8 bs=64k oflag=direct status=none
cmp -n 1048576 random /dev/nbd8
nbd-client -d /dev/nbd8 >/dev/null
kill $server
wait $server

sheave detach disk.img
unloads() { rmmod "$1" 2>/dev/null; }
unload() { wait_for "$1 is unloaded" unloads "$1"; }
# attaches PREFIX ARGUMENT...: to a device with a name that begins so.
attaches() {
    local prefix=$1 device
    shift
    device=$(sheave attach "$@")
    [[ $device = $prefix* ]] || fail "$device, not $prefix"
}
unload nbd
# The driver is loaded when it is needed …
attaches /dev/nbd --front nbd disk.img
sheave detach disk.img
unload nbd
# … unless it cannot be.
echo 'install nbd /bin/false' >/etc/modprobe.d/none.conf
refused 'modprobe nbd' sheave attach --front nbd disk.img
if [[ $(fronts) = *ublk* ]]; then
    attaches /dev/ublkb disk.img
    sheave detach disk.img
    unload ublk_drv
    attaches /dev/ublkb --front ublk disk.img
    sheave detach disk.img
    unload ublk_drv
    echo 'install ublk_drv /bin/false' >>/etc/modprobe.d/none.conf
    refused 'modprobe ublk_drv' sheave attach --front ublk disk.img
fi
refused 'neither ublk nor nbd works here' sheave attach disk.img
sed -i '/nbd/d' /etc/modprobe.d/none.conf
attaches /dev/nbd disk.img
rm /etc/modprobe.d/none.conf

# What is known of it is damaged: the device is left alone.
kill_daemon
record=$(ls /var/lib/sheave/devices/*.json)
sed -i 's/disk/dusk/' "$record"
start_daemon
logged 'record cannot be used'
expect 'no devices' "$(sheave ls)"
expect 1 "$(connected | wc -w)"
stop_daemon
sed -i 's/dusk/disk/' "$record"
# It is whole again.
start_daemon
logged recovered
sheave detach disk.img
stop_daemon
expect '' "$(connected)"
