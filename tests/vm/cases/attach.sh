#!/bin/bash
# Volumes as devices of every front: made, used, found again, ended.
. ./common.sh

mkdir -p mounted
head -c 64k /dev/urandom >random_part

# A file system on a device, then the same one in the image.
file_system() {
    local type=$1 disk
    truncate -s 400M $type.img
    disk=$(sheave attach --front $front $type.img)
    mkfs.$type -q "$disk" >mkfs.log 2>&1 || fail "mkfs.$type: $(cat mkfs.log)"
    mount "$disk" mounted
    cp -a /usr/sbin mounted/
    refused 'is in use' sheave detach "$disk"
    umount mounted
    clean $type "$disk"
    mount -o ro "$disk" mounted
    diff -r --no-dereference /usr/sbin mounted/sbin
    umount mounted
    sheave detach "$disk"
    mount -o ro,loop $type.img mounted
    diff -r --no-dereference /usr/sbin mounted/sbin
    umount mounted
    rm $type.img
}

for front in $(fronts); do
    truncate -s 256M disk.img
    start_daemon
    device=$(sheave attach --front $front disk.img)
    name=${device#/dev/}
    expect "$device" "$(sheave attach "$PWD/disk.img")"
    expect $((256 << 11)) "$(cat "/sys/block/$name/size")"
    # It is tuned soon after it can be used.
    wait_for "$name is tuned" grep -qx 1024 "/sys/block/$name/queue/read_ahead_kb"
    expect 1024 "$(cat "/sys/block/$name/queue/max_sectors_kb")"
    grep -qF '[none]' "/sys/block/$name/queue/scheduler" || fail 'a scheduler is in the way'
    expect 'write back' "$(cat "/sys/block/$name/queue/write_cache")"
    expect 1 "$(cat "/sys/block/$name/queue/fua")"
    expect 1 "$(ls /var/lib/sheave/devices | grep -c json)"
    for type in ext4 xfs btrfs; do file_system $type; done

    memory=$(sheave attach --front $front 'memory:?size=64M')
    truncate -s 64M cached.img uncached.img
    cached=$(sheave attach --front $front cached.img)
    uncached=$(sheave attach --front $front "uncached.img?direct=true")
    for loaded in "$memory" "$cached" "$uncached"; do
        block=$(cat "/sys/block/${loaded#/dev/}/queue/logical_block_size")
        fio --name=verify --filename="$loaded" --direct=1 --ioengine=libaio --iodepth=32 --rw=randrw \
            --bsrange="$block-256k" --size=64M --io_size=64M --verify=crc32c --verify_fatal=1 \
            >fio.log 2>&1 || fail "fio on $loaded: $(cat fio.log)"
    done
    # Where the driver can, requests on files are served in place.
    if [ "$front" = ublk ] && [[ "$(uname -r)" = 7.* ]]; then
        grep -q 'UserBufs:.*4096' /proc/$daemon/fdinfo/* || fail 'nothing was to be registered'
    fi
    ! grep -q 'copied from now on' daemon.log || fail 'requests were not served in place'
    sheave detach "$cached"
    sheave detach "$uncached"
    blkdiscard -o 1M -l 8M "$memory"
    blkdiscard -z -o 16M -l 8M "$memory"
    cmp -n 8M -i 1M:0 "$memory" /dev/zero
    cmp -n 8M -i 16M:0 "$memory" /dev/zero

    frozen=$(sheave attach --front $front --read-only 'null:?size=1G')
    expect 1 "$(blockdev --getro "$frozen")"
    ! dd if=/dev/zero of="$frozen" bs=4k count=1 oflag=direct status=none 2>dd.log ||
        fail 'a read-only device was written'
    refused 'for writing' sheave attach --read-only disk.img
    refused 'read-only' sheave attach 'null:?size=1G'
    expect "$frozen" "$(sheave attach --read-only 'null:?size=1G')"
    expect "$device" "$(sheave attach ././disk.img)"
    others=$(fronts | tr ' ' '\n' | grep -v $front || true)
    [ -z "$others" ] || refused 'by the other front' sheave attach --front $others disk.img

    # A disk with partitions.
    partitioned parts.img
    parts=$(sheave attach --front $front parts.img)
    has_partition "$parts"
    # A user of a partition uses the device.
    mkfs.ext4 -q -F "${parts}p1" 1M 2>mkfs.log
    mount "${parts}p1" mounted
    refused "$PWD/mounted" sheave detach parts.img
    umount mounted
    loop=$(losetup --find --show "${parts}p1")
    refused "${loop#/dev/}" sheave detach parts.img
    losetup --detach "$loop"
    head -c 64k random_part >"${parts}p1"
    sheave detach parts.img
    cmp -n 64k -i 0:1M random_part parts.img
    rm parts.img

    # What a program holds open is not taken from it, and what it wrote is written.
    exec 7<>"$device"
    refused 'is in use: process' sheave detach "$device"
    exec 7>&-
    # Whatever it is called there.
    mknod -m 600 other b $(cat "/sys/block/$name/dev" | tr : ' ')
    exec 7<>other
    rm other
    refused 'is in use: process' sheave detach "$device"
    head -c 8M /dev/urandom >random
    cat random >&7
    exec 7>&-
    sheave detach "$device"
    cmp -n 8M random disk.img
    for target in 'memory:?size=64M' "$frozen"; do sheave detach "$target"; done
    expect 'no devices' "$(sheave ls)"
    expect '' "$(connected)"
    expect '' "$(ls /var/lib/sheave/devices | grep json || true)"
    stop_daemon
    rm disk.img
done
