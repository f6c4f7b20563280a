# Sourced after common.sh and claims.sh: three ways by which a container gets a volume of the pool,
# one of them in two forms. WAY_make, WAY_open, WAY_close, WAY_grow, WAY_delete take the steps as
# the way's orchestrator does. They use $name, $front, $kind, and set $id, $place.

# What is between the orchestrator and the daemon.
start_way() {
    case $way in
        csi) start_plugin ;;
        docker) start_docker_plugin ;;
        flexvolume*)
            local mode=()
            [ $way = flexvolume ] || mode=(--attach --node guest)
            # No process is left: each call is one.
            mkdir -p exec
            sheave flexvolume install "$PWD/exec" "${mode[@]}" >/dev/null
            flex init
            ;;
    esac
}

kill_way() {
    case $way in
        csi) kill_plugin ;;
        docker)
            kill -9 $plugin
            ended $plugin 'a killed plugin'
            wait $plugin 2>/dev/null || true
            ;;
    esac
}

stop_way() {
    case $way in
        csi | docker)
            kill $plugin
            ended $plugin 'the plugin'
            wait $plugin || fail "the plugin ended with $?"
            ;;
        flexvolume*) rm -r exec ;;
    esac
    [ $way != docker ] || end_dockerd
}

csi_make() { id=$(claim create $front $(($1 << 20)) "$name"); }
csi_open() {
    claim stage "$id"
    place=$(claim pod one "$id")
}
csi_close() {
    claim unpod one "$id"
    claim unstage "$id"
}
csi_grow() { claim expand one $(($1 << 20)) "$id" >/dev/null; }
csi_delete() { claim delete "$id"; }

# flex OPERATION ARGUMENT...: it must succeed. Kubelet reads both streams and takes them for one
# JSON object, whose status must agree with that of the process. Sets `said`.
flex() {
    local status=Success
    said=$(exec/sheave.dev~sheave/sheave "$@" 2>&1) || status=Failure
    [[ $status = Success && $said = '{"status":"Success"'*'}' && $said != *$'\n'* ]] ||
        fail "$*: $said"
}
# field NAME: of what was said.
field() { sed -E "s/.*\"$1\": ?\"?([^\",}]*).*/\1/" <<<"$said"; }

# flex_options [KEY VALUE...]: of the volume, with what kubelet adds for a call.
flex_options() {
    printf '{"volume":"fast/%s","front":"%s"' "$name" $front
    printf ',"kubernetes.io/%s":"%s"' fsType $kind readwrite rw pvOrVolumeName "$name" "$@"
    echo '}'
}
flex_pod() { flex_options pod.uid one mounterArgs.FsGroup 2000; }

flexvolume_make() { made_by_hand "$1"; }
flexvolume_open() {
    place=$PWD/pods/one/$name
    mkdir -p "$place"
    flex mount "$place" "$(flex_pod)"
}
flexvolume_close() {
    flex unmount "$place"
    [ ! -d "$place" ] || rmdir "$place"
}
# The controller of Kubernetes leaves it to kubelet (noop_expandable_plugin.go).
flexvolume_grow() {
    flex expandfs "$(flex_options)" "$device" "$place" $(($1 << 20)) 0
}
flexvolume_delete() { sheave volume delete "fast/$name" >/dev/null; }

# With attach: controller-manager, then kubelet for the node, then kubelet for the pod.
flexvolume_attach_make() { made_by_hand "$1"; }
flexvolume_attach_open() {
    local attached
    flex attach "$(flex_options)" guest
    attached=$(field device)
    flex isattached "$(flex_options)" guest
    expect true "$(field attached)"
    flex waitforattach "$attached" "$(flex_options)"
    staged=$PWD/stage/$name
    mkdir -p "$staged"
    flex mountdevice "$staged" "$(field device)" "$(flex_options)"
    flexvolume_open
}
flexvolume_attach_close() {
    flexvolume_close
    flex unmountdevice "$staged"
    [ ! -d "$staged" ] || rmdir "$staged"
    flex detach "$name" guest
}
flexvolume_attach_grow() { flexvolume_grow "$1"; }
flexvolume_attach_delete() { flexvolume_delete; }

made_by_hand() {
    sheave volume create "fast/$name" --size "$1M" >/dev/null
    id=$(of_volume id)
}
of_volume() {
    sheave volume info "fast/$name" --json |
        python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

# In place of dockerd, whose end is that of its containers: it asks what comes in lines, the path
# and the body of a call, and prints answers.
dockerd='
import json, os, socket, sys
for line in sys.stdin:
    path, body = line.split(" ", 1)
    plugin = socket.socket(socket.AF_UNIX)
    plugin.connect(sys.argv[1])
    head = f"POST {path} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n"
    plugin.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    answer = b"".join(iter(lambda: plugin.recv(65536), b""))
    print(answer.split(b"\r\n\r\n", 1)[1].decode().strip(), flush=True)
'
start_docker_plugin() {
    sheave docker-plugin --node-id guest --socket "$PWD/docker.sock" >docker.log 2>&1 &
    plugin=$!
    wait_for 'the plugin starts' plugin_is_ready docker.log
    [ -z "${dockerd_pid:-}" ] || return 0
    coproc dockerd { exec python3 -c "$dockerd" "$PWD/docker.sock"; }
    dockerd_pid=$!
    docker_call Plugin.Activate '{}'
}
end_dockerd() {
    kill $dockerd_pid
    wait $dockerd_pid || true
    dockerd_pid=
}
# docker_call PATH BODY: it must succeed. Sets `said`.
docker_call() {
    echo "/$1 $2" >&"${dockerd[1]}"
    read -r said <&"${dockerd[0]}" || fail "$1: no answer"
    grep -qE '"Err": ?""|"Implements"' <<<"$said" || fail "$1: $said"
}
docker_make() {
    local options='"pool":"fast","size":"%sM","fstype":"%s","front":"%s"'
    # shellcheck disable=SC2059 # a format
    docker_call VolumeDriver.Create \
        "{\"Name\":\"$name\",\"Opts\":{$(printf "$options" "$1" $kind $front)}}"
    id=$(of_volume id)
}
docker_open() {
    docker_call VolumeDriver.Mount "{\"Name\":\"$name\",\"ID\":\"one\"}"
    place=$(field Mountpoint)
}
docker_close() { docker_call VolumeDriver.Unmount "{\"Name\":\"$name\",\"ID\":\"one\"}"; }
# Docker has no call for this.
docker_grow() { sheave volume resize "fast/$name" --size "$1M" >/dev/null; }
docker_delete() { docker_call VolumeDriver.Remove "{\"Name\":\"$name\"}"; }
