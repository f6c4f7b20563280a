#!/bin/bash
# Volumes as /dev/nbdN: made, used, found again, ended.
. ./common.sh

truncate -s 256M disk.img
start_daemon
device=$(sheave attach disk.img)
name=${device#/dev/}
expect "$device" "$(sheave attach --front nbd "$PWD/disk.img")"
expect $((256 << 11)) "$(cat "/sys/block/$name/size")"
expect "$PWD/disk.img" "$(cat "/sys/block/$name/backend")"
expect 1024 "$(cat "/sys/block/$name/queue/max_sectors_kb")"
expect 1024 "$(cat "/sys/block/$name/queue/read_ahead_kb")"
grep -qF '[none]' "/sys/block/$name/queue/scheduler" || fail 'a scheduler is in the way'
expect 'write back' "$(cat "/sys/block/$name/queue/write_cache")"

mkdir -p mounted
for type in ext4 xfs btrfs; do
    truncate -s 400M $type.img
    disk=$(sheave attach $type.img)
    mkfs.$type "$disk" >mkfs.log 2>&1 || fail "mkfs.$type: $(cat mkfs.log)"
    mount "$disk" mounted
    cp -a /usr/bin mounted/
    refused 'is in use' sheave detach "$disk"
    umount mounted
    case $type in
        ext4) e2fsck -fn "$disk" >fsck.log 2>&1 ;;
        xfs) xfs_repair -n "$disk" >fsck.log 2>&1 ;;
        btrfs) btrfs check "$disk" >fsck.log 2>&1 ;;
    esac || fail "$type: $(cat fsck.log)"
    mount -o ro "$disk" mounted
    diff -r --no-dereference /usr/bin mounted/bin
    umount mounted
    sheave detach "$disk"
    # What was written is in the image.
    mount -o ro,loop $type.img mounted
    diff -r --no-dereference /usr/bin mounted/bin
    umount mounted
    rm $type.img
done

memory=$(sheave attach 'memory:?size=64M')
fio --name=verify --filename="$memory" --direct=1 --ioengine=libaio --iodepth=32 --rw=randrw \
    --bsrange=512-256k --size=64M --io_size=256M --verify=crc32c --verify_fatal=1 >fio.log 2>&1 ||
    fail "fio: $(cat fio.log)"

frozen=$(sheave attach --read-only 'null:?size=1G')
expect 1 "$(blockdev --getro "$frozen")"
refused 'for writing' sheave attach --read-only disk.img

for target in disk.img 'memory:?size=64M' "$frozen"; do sheave detach "$target"; done
expect 'no devices' "$(sheave ls)"
expect '' "$(connected)"
stop_daemon
