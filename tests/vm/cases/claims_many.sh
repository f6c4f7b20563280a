#!/bin/bash
# Many claims are staged at once, on a node that loses its power: PHASE=before stages and fills
# them; the node boots again (`tests/vm/run --reset`); PHASE=after stages them again, as kubelet
# asks, and ends them. VOLUMES=10: one in five is raw, and each front has its share.
. ./common.sh
. ./claims.sh

# On the disk: the directory of the command is another one after the reset.
home=/var/lib/claims
count=${VOLUMES:-10}

# What a failed run has left.
[ "${PHASE:?before or after}" = after ] || rm -rf $home
mkdir -p $home
cp claim $home
cd $home

# How many files daemon and plugin have open.
files() { ls "/proc/$daemon/fd" "/proc/$plugin/fd" | wc -l; }
# Their connections stay open; nothing does for each volume.
has_files() { [ "$(files)" -lt $(($1 + count)) ]; }

# timed WHAT COMMAND...: prints how long the command takes. Native tests bound it; an emulated
# machine is several times slower than any other.
timed() {
    local what=$1 from_us=${EPOCHREALTIME/[.,]/}
    shift
    "$@"
    echo "claims_many: $count $what: $(((${EPOCHREALTIME/[.,]/} - from_us) / 1000)) ms"
}

# all STEP...: of the claims of each kind, at once.
all() {
    local kind jobs=() job
    for kind in ext4 block; do
        claim "$@" $(cat ids.$kind) &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
}

# block_of PLACE: what is written to a raw claim.
block_of() { python3 -c 'import sys; sys.stdout.write((sys.argv[1] + "\n").ljust(4096))' "$1"; }

before() {
    local front kind place number names share fronts=($(fronts))
    start_node
    for kind in ext4 block; do
        share=$((count / 5 / ${#fronts[@]}))
        [ $kind = block ] || share=$((share * 4))
        for front in "${fronts[@]}"; do
            names=()
            for number in $(seq $share); do names+=("$front-$kind-$number"); done
            claim create $front $((8 << 20)) "${names[@]}" >>ids.$kind
        done
    done
    expect $count "$(cat ids.* | wc -l)"
    timed 'made, formatted and mounted' all stage
    expect $count "$(connected | wc -w)"
    for kind in ext4 block; do claim pod one $(cat ids.$kind) >places.$kind; done
    for place in $(cat places.ext4); do echo "$place" >"$place/name"; done
    sync $(sed 's,$,/name,' places.ext4)
    for place in $(cat places.block); do
        block_of "$place" | dd of="$place" bs=4k oflag=direct,sync iflag=fullblock status=none
    done
    # What the orchestrator keeps elsewhere.
    sync ids.* places.* .
}

after() {
    local id place files
    start_node
    expect 'no devices' "$(sheave ls)"
    expect '' "$(grep -F " $PWD/" /proc/mounts || true)"
    files=$(files)
    # The pod of this one was deleted meanwhile.
    kind=ext4
    id=$(head -n 1 ids.ext4)
    claim unpod one "$id"
    claim unstage "$id"
    claim delete "$id"
    sed -i 1d ids.ext4 places.ext4
    count=$((count - 1))

    timed 'mounted after the boot' all stage
    expect $count "$(connected | wc -w)"
    for kind in ext4 block; do
        expect "$(cat places.$kind)" "$(claim pod one $(cat ids.$kind))"
    done
    for place in $(cat places.ext4); do expect "$place" "$(cat "$place/name")"; done
    for place in $(cat places.block); do
        expect b "$(stat -c %F "$place" | cut -c1)"
        cmp <(block_of "$place") <(dd if="$place" bs=4k count=1 iflag=direct status=none)
    done

    all unpod one
    timed 'unmounted' all unstage
    all delete
    nothing_left
    wait_for "files are closed, $files were open" has_files "$files"
    stop_node
    cd /
    rm -r $home
}

$PHASE
