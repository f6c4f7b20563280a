#!/bin/bash
# Claims and pods of every kind come and go on devices of each front, as a seed determines it: calls
# are doubled, lost and repeated, and plugin and daemon are killed under them (tests/src/co). All
# that was written is there, and nothing is left behind. SEED=1 STEPS=300
. ./common.sh
. ./soak.sh
. ./claims.sh

closing=
kind=ext4
make_pool
for front in $(fronts); do
    kubelet=$PWD/kubelet.$front
    mkdir "$kubelet"
    SHEAVE_BIN=$(command -v sheave) claim simulate $front "${SEED:-1}" "${STEPS:-300}" >said ||
        fail "$front: seed ${SEED:-1}"
    cat said
    closing+="${closing:+; }$(cat said)"
    # By the words of another daemon.
    start_node
    nothing_left
    stop_node
    expect '' "$(find "$kubelet" ! -type d)"
done
kernel_is_well 'I/O error'
echo "simulated: $closing"
