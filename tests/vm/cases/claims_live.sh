#!/bin/bash
# Claims of every kind on devices of every front: made, staged, formatted, written, grown, given to
# a second pod, deleted. What was written is compared at each step.
. ./common.sh
. ./claims.sh

# MiB of a volume of this kind: little, and enough for its filesystem.
size_of() {
    case $1 in
        block) echo 32 ;;
        ext4) echo 64 ;;
        btrfs) echo 160 ;;
        xfs) echo 320 ;;
    esac
}

# room: what a pod sees of the size, in MiB.
room() {
    case $kind in
        block) echo $(($(blockdev --getsize64 "$place") >> 20)) ;;
        *) df --output=size -BM "$place" | tail -n 1 | tr -dc 0-9 ;;
    esac
}

# expands POD MIB: while a program writes. The pod keeps its mount.
expands() {
    local id_of_mount writer
    id_of_mount=$(mount_of "$place")
    put_while_growing &
    writer=$!
    expect $(($2 << 20)) "$(claim expand "$1" $(($2 << 20)) "$id")"
    wait $writer || fail 'a write failed while the volume grew'
    expect "$id_of_mount" "$(mount_of "$place")"
    expect $(($2 << 20)) "$(blockdev --getsize64 "$device")"
}

put_while_growing() {
    local name=$place/growing at=(seek=0)
    # What is put next overwrites it.
    [ $kind != block ] || { name=$place && at=("seek=$content_mib"); }
    for _ in 1 2 3; do
        dd if=/dev/zero of="$name" bs=1M count=4 "${at[@]}" oflag=direct conv=fsync,notrunc \
            status=none || return 1
    done
}

live() {
    local size before image
    size=$(size_of $kind)
    new_content
    id=$(claim create $front $((size << 20)) "$front-$kind")
    expect "$id" "$(claim create $front $((size << 20)) "$front-$kind")"
    image=$(echo images/*.img)
    expect '' "$(connected)"
    claim stage "$id"
    device=$(device_of "$id")
    [[ $device = /dev/$front* ]] || fail "$front: $device"
    expect $((size << 20)) "$(blockdev --getsize64 "$device")"
    place=$(claim pod one "$id")
    is_from_device
    put first 6
    check
    before=$(room)
    refused 'allows one place' claim pod two "$id"
    refused 'FailedPrecondition' claim delete "$id"
    if grows $front; then
        expands one $((size * 2))
        [ "$(room)" -gt $((before * 3 / 2)) ] || fail "$kind: $(room) MiB after $before"
    else
        # The volume is larger, the device is so when it is made anew.
        refused 'restart the pods' claim expand one $((size * 2 << 20)) "$id"
        expect "$before" "$(room)"
    fi
    check
    put second 6
    check
    claim unpod one "$id"
    claim unstage "$id"
    expect '' "$(connected)"
    [ $kind = block ] || clean $kind "$image"
    [ $kind != block ] || check "$image"

    claim stage "$id"
    device=$(device_of "$id")
    place=$(claim pod two "$id")
    is_from_device
    check
    expands two $((size * 2))
    [ "$(room)" -gt $((before * 3 / 2)) ] || fail "$kind: $(room) MiB after $before"
    # More than there was room for.
    [ $kind = xfs ] || put third $((size + 4))
    check
    expect healthy "$(claim condition two "$id")"
    claim unpod two "$id"
    claim unstage "$id"
    claim delete "$id"
    nothing_left
}

start_node
for front in $(fronts); do
    for kind in ext4 xfs btrfs block; do
        from=$SECONDS
        live
        echo "$front $kind: $((SECONDS - from)) s"
    done
done
stop_node
