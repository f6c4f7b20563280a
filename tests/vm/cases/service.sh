#!/bin/bash
# The daemon as a service of systemd, by its own units: what docs/daemon.md and docs/systemd.md say.
. ./common.sh

units=/etc/systemd/system
state=/var/lib/sheave-service

# What systemd says of the service.
of() { systemctl show --value --property "$1" sheave.service; }

# What the daemon has said since then, and what systemd has of it.
journal() { journalctl --quiet --no-pager --output cat --unit sheave.service --unit sheave.socket --since "@$since"; }

has_said() { journal | grep -F -- "$1" >/dev/null; }

# said TEXT: waits until it has.
said() { wait_for "the service says \"$1\"" has_said "$1"; }

is() { [ "$(of ActiveState)/$(of SubState)" = "$1" ]; }

# becomes STATE
becomes() { wait_for "the service becomes $1" is "$1"; }

# is_other PID: another process is the service.
is_other() {
    local main
    main=$(of MainPID)
    [ "$main" != "$1" ] && [ "$main" != 0 ]
}

# replaced COMMAND...: after it, another process is the service.
replaced() {
    local old
    old=$(of MainPID)
    since=$(date +%s)
    "$@"
    wait_for "another process after: $*" is_other "$old"
    ended "$old" "the old process after: $*"
    becomes active/running
}

# served_on: the file systems are there, and their data is right, also what is written now.
served_on() {
    local front
    for front in $(fronts); do
        said "recovered volume=\"$state/$front.img"
        head -c 4M /dev/urandom >$front/more
        sync -f $front/more
        echo 3 >/proc/sys/vm/drop_caches
        sha256sum --quiet -c $front.sum
    done
}

trap 'status=$?; [ $status = 0 ] || journal >&2; exit $status' EXIT

since=$(date +%s)
install -m 644 deploy/systemd/sheave.{service,socket} $units
install -m 644 deploy/udev/60-sheave-ublk.rules /etc/udev/rules.d
mkdir -p $units/sheave.service.d $state
# Shorter than in life, so that it can be waited for; the guest is many times slower.
watchdog_s=20
cat >$units/sheave.service.d/test.conf <<C
[Service]
WatchdogSec=${watchdog_s}s
TimeoutAbortSec=2s
C
systemctl daemon-reload
systemctl enable --quiet --now sheave.socket sheave.service
expect 'no devices' "$(sheave ls)"
systemctl is-enabled --quiet sheave.service

# All that it protects itself with is allowed, and drivers are there.
declare -A device
for front in $(fronts); do
    truncate -s 64M $state/$front.img
    device[$front]=$(sheave attach --front $front $state/$front.img)
    mkfs.ext4 -q -L sheave-test-$front "${device[$front]}"
    mkdir -p $front
    mount "${device[$front]}" $front
    head -c 8M /dev/urandom >$front/data
    sha256sum $front/data >$front.sum
done
expect 0 "$(journal | grep -cE 'WARN|ERROR' || true)"
devices=$(sheave ls --json)

# What is on them has a name. A udev that is slow has taken more than ten seconds for it.
leads() { [ "$(readlink -f "$1")" = "$2" ]; }
for front in $(fronts); do
    link=/dev/disk/by-label/sheave-test-$front
    wait_for "$link leads to ${device[$front]}" leads $link "${device[$front]}"
done

# Partitions are found in the service's confines, too.
for front in $(fronts); do
    partitioned $state/parts.img
    parts=$(sheave attach --front $front $state/parts.img)
    has_partition "$parts"
    sheave detach "$parts"
done

# A reload is a takeover: another process, the same service, whose watchdog looks at the new one.
replaced systemctl reload sheave.service
served_on
expect "$devices" "$(sheave ls --json)"
main=$(of MainPID)
sleep $((watchdog_s + 5))
expect "$main" "$(of MainPID)"
expect 0 "$(of NRestarts)"

# Only systemd's own may take over from it.
refused 'systemctl reload' sheave daemon --takeover
expect "$main" "$(of MainPID)"

# One that dies is started again.
replaced systemctl kill --kill-who=main --signal=KILL sheave.service
served_on
expect "$devices" "$(sheave ls --json)"

# So is one that gives no sign of life.
replaced kill -STOP "$(of MainPID)"
said 'Watchdog timeout'
served_on
expect "$devices" "$(sheave ls --json)"

# A stop waits for the users of its devices. A second signal ends it, and the next daemon serves
# them.
systemctl stop --no-block sheave.service
said 'served on'
becomes deactivating/stop-sigterm
[[ $(of StatusText) = *'in use'* ]] || fail "its status is \"$(of StatusText)\""
systemctl kill sheave.service
becomes failed/failed
since=$(date +%s)
systemctl start sheave.service
served_on
for front in $(fronts); do umount $front; done
timeout $patience_s systemctl stop sheave.service 2>stop.log || fail "$(cat stop.log)"
expect inactive/success "$(of ActiveState)/$(of Result)"
expect '' "$(connected)"
for front in $(fronts); do clean ext4 $state/$front.img; done

# The socket starts it.
expect 'no devices' "$(sheave ls)"
becomes active/running

# At shutdown: file systems with _netdev are unmounted before the daemon ends, which it then does.
for front in $(fronts); do
    sheave attach --front $front $state/$front.img >/dev/null
    echo "LABEL=sheave-test-$front $PWD/$front ext4 _netdev,noauto 0 0" >>/etc/fstab
done
systemctl daemon-reload
for front in $(fronts); do
    systemctl start "$(systemd-escape --path --suffix=mount "$PWD/$front")"
    sha256sum --quiet -c $front.sum
    head -c 8M /dev/urandom >$front/data
    sha256sum $front/data >$front.sum
done
since=$(date +%s)
# What shutdown.target does to these.
cat >$units/sheave-test-end.target <<C
[Unit]
Conflicts=sheave.service remote-fs-pre.target
C
for front in $(fronts); do
    echo "Conflicts=$(systemd-escape --path --suffix=mount "$PWD/$front")"
done >>$units/sheave-test-end.target
systemctl daemon-reload
systemctl start sheave-test-end.target
becomes inactive/dead
expect inactive/success "$(of ActiveState)/$(of Result)"
! journal | grep 'served on' || fail 'it was ended before what uses it'
expect '' "$(connected)"
systemctl stop sheave-test-end.target
for front in $(fronts); do
    clean ext4 $state/$front.img
    mount -o loop $state/$front.img $front
    sha256sum --quiet -c $front.sum
    umount $front
done

# A wrong configuration is no reason to try again.
systemctl stop sheave.service sheave.socket
mkdir -p /etc/sheave
echo 'shards = 1000' >/etc/sheave/daemon.toml
since=$(date +%s)
! systemctl start sheave.service 2>start.log || fail 'it started'
becomes failed/failed
said 'daemon.toml'
expect 2/0 "$(of ExecMainStatus)/$(of NRestarts)"
rm -r /etc/sheave
systemctl stop sheave.socket

# The other units: a server that the first client starts, at another image by a drop-in.
install -m 644 deploy/systemd/sheave@.{service,socket} $units
mkdir -p /var/lib/sheave
truncate -s 16M /var/lib/sheave/disk.img
systemctl daemon-reload
systemctl start sheave@disk.socket
nbd-client -N disk -unix /run/sheave-disk.sock /dev/nbd15 -b 512 >nbd.log 2>&1 || fail "$(cat nbd.log)"
mkfs.ext4 -q /dev/nbd15
expect 1 "$(sheave stats --json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))')"
nbd-client -d /dev/nbd15 >/dev/null
systemctl stop sheave@disk.socket sheave@disk.service
clean ext4 /var/lib/sheave/disk.img
rm /var/lib/sheave/disk.img

sed -i '/sheave-test/d' /etc/fstab
systemctl disable --quiet sheave.socket sheave.service
# It has failed for its configuration.
systemctl reset-failed sheave.service
rm -r $units/sheave* /etc/udev/rules.d/60-sheave-ublk.rules $state
systemctl daemon-reload
