# Sourced by the scripts beside it.
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/common.sh"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Everything that is built, kept and run. An absolute path: programs run in other directories.
work=$(realpath -m "${K8S_WORK:-$sheave_cache/k8s}")
kbin=$work/kbin
csibin=$work/csibin
# Logs of one life of the cluster.
log=$work/log
run=$work/run
# The addresses exist only in the network namespace and in the guest.
namespace=${K8S_NETNS:-sheave-k8s}
host_ip=10.99.0.1
guest_ip=10.99.0.2
guest_port=7000
export PATH=$PATH:/usr/sbin:/sbin KUBECONFIG=$work/pki/admin.kubeconfig

inside() { ip netns exec "$namespace" "$@"; }
kubectl() { inside "$kbin/kubectl" "$@"; }

# guest [--timeout S] COMMAND: a shell command in the guest, with its output and its status.
guest() { inside "$here/guest-run" "$guest_ip" "$guest_port" "$@"; }
# push FILE DESTINATION: copies a file into the guest.
push() { guest --timeout 200 --push "$@"; }

# helm FLAG...: the one of the tests.
helm() { inside "$(go -C "$here/../tools/chart" tool -n helm)" "$@"; }

# claims CLASS SUFFIX: two claims of a class, with this behind their names; and a pod that uses them.
claims() {
    sed -E "s/storageClassName: sheave/storageClassName: $1/
        s/name: (data|raw)\}\$/name: \1$2}/" "$here/objects/claims.yaml"
}
pod() {
    sed -E "s/name: writer\}\$/name: writer$1}/
        s/claimName: (data|raw)\}/claimName: \1$1}/" "$here/objects/pod.yaml"
}
manifests() { claims "$1" "$2"; echo ---; pod "$2"; }

# start NAME COMMAND...: a process in the namespace that outlives the script.
start() {
    local name=$1 pid
    shift
    (
        # A lock that a caller holds must not be held for as long as the cluster lives.
        for fd in /proc/self/fd/*; do
            fd=${fd##*/}
            [ "$fd" -le 2 ] || eval "exec $fd>&-"
        done
        exec ip netns exec "$namespace" setsid "$@" >"$log/$name.log" 2>&1 </dev/null
    ) &
    pid=$!
    echo "$pid" >"$run/$name.pid"
}

# The process that was started under this name, if it is still the same one.
pid_of() {
    local pid
    pid=$(cat "$run/$1.pid" 2>/dev/null) || return 1
    # All of them have a path of the cache among their arguments.
    grep -qsF "$work" "/proc/$pid/cmdline" && echo "$pid"
}

# wait_until SECONDS WHAT COMMAND...: polls; dies with WHAT if the command never succeeds.
wait_until() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || die "$what: not within its time"
        sleep 0.3
    done
}

# timed WHAT COMMAND...: runs it, and says how long it took. A script with `set -e` ends where the
# command fails.
timed() {
    local what=$1 from=$EPOCHREALTIME
    shift
    "$@"
    say "$what: $(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $from }") s"
}

# What every guest of the cluster has. A kernel that has hurt itself must not look like a slow one.
kernel_args='console=ttyS0 quiet mitigations=off nowatchdog panic=-1 oops=panic'
kernel_args+=' rcupdate.rcu_cpu_stall_suppress=1 cgroup_no_v1=all'
machine=(
    -accel tcg,thread=multi -smp 2 -m "${K8S_MEM:-4096}" -machine q35 -display none -nodefaults
    # A kernel that sees these copies by "rep movsb", which is emulated byte by byte.
    -cpu 'max,-erms,-fsrm' -no-reboot -device virtio-rng-pci
    -kernel "$work/vmlinuz" -initrd "$work/initramfs.gz"
)

install_flags=() default_class=sheave-nbd
# What the node is: a guest, or namespaces of this machine.
node=$(cat "$run/node" 2>/dev/null) || node=${K8S_NODE:-guest}
[ "$node" != native ] || . "$here/native/common.sh"
