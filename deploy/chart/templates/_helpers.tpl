{{- define "sheave.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "sheave.labels" -}}
app.kubernetes.io/name: sheave
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Those that a selector has, which cannot be changed. */}}
{{- define "sheave.selector" -}}
app.kubernetes.io/name: sheave
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "sheave.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ .Values.driverName }}
{{- end }}

{{/* The configuration of the daemon, and of a controller without one. */}}
{{- define "sheave.config" -}}
{{- with .Values.daemon.shards }}
{{- printf "shards = %d\n" (int .) }}
{{- end }}
{{- range $name, $pool := .Values.pools }}
{{- printf "[pools.%s]\n" $name }}
{{- range $key, $value := omit $pool "create" "volumes" }}
{{- printf "%s = %s\n" $key (kindIs "float64" $value | ternary (printf "%d" (int64 $value)) (toJson $value)) }}
{{- end }}
{{- with $pool.volumes }}
{{- printf "[pools.%s.volumes]\n" $name }}
{{- range $key, $value := . }}
{{- printf "%s = %s\n" (toJson $key) (toJson $value) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The directories of pools, as volumes of a pod. */}}
{{- define "sheave.poolVolumes" -}}
{{- range $name, $pool := .Values.pools }}
{{- if hasPrefix "file://" (default "" $pool.url) }}
- name: pool-{{ $name }}
  hostPath:
    path: {{ trimPrefix "file://" $pool.url }}
    type: {{ $pool.create | default false | ternary "DirectoryOrCreate" "Directory" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "sheave.poolMounts" -}}
{{- range $name, $pool := .Values.pools }}
{{- if hasPrefix "file://" (default "" $pool.url) }}
- name: pool-{{ $name }}
  mountPath: {{ trimPrefix "file://" $pool.url }}
  # What is mounted below it later is seen, too.
  mountPropagation: HostToContainer
{{- end }}
{{- end }}
{{- end }}

{{- define "sheave.probes" -}}
# A restart helps only if the plugin's own socket does not answer.
livenessProbe:
  httpGet: {path: /healthz, port: health}
  # Nor if the node has too much to do.
  periodSeconds: 30
  timeoutSeconds: 20
  failureThreshold: 5
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 5
  timeoutSeconds: 10
{{- end }}

{{/* A program of the Kubernetes project. It has root's id, since the socket is root's, and no more. */}}
{{- define "sheave.sidecarSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{- define "sheave.sidecarArgs" -}}
- --csi-address=/csi/csi.sock
- --timeout=30s
- --v={{ .Values.sidecars.logLevel }}
{{- end }}

{{/* With the usual rate of 5 calls a second, many claims at once would wait for the API server. */}}
{{- define "sheave.apiRate" -}}
- --kube-api-qps=50
- --kube-api-burst=100
{{- end }}

{{- define "sheave.check" -}}
{{- if and (eq .Values.mode "node") .Values.volumeAttributesClasses }}
{{- fail "volumeAttributesClasses need mode controller: nothing that modifies volumes reaches each node" }}
{{- end }}
{{- if and (eq .Values.mode "node") .Values.sidecars.healthMonitor.enabled }}
{{- fail "sidecars.healthMonitor needs mode controller: it calls one plugin about all volumes" }}
{{- end }}
{{- range .Values.storageClasses }}
{{- if not (hasKey $.Values.pools .pool) }}
{{- fail (printf "storage class %s: there is no pool %s in pools" .name .pool) }}
{{- end }}
{{- end }}
{{- if and (eq .Values.mode "controller") (gt (int .Values.controller.replicas) 0) }}
{{- range $name, $pool := .Values.pools }}
{{- if and (hasPrefix "file://" (default "" $pool.url)) (not $pool.shared) }}
{{- fail (printf "pool %s is a directory of one node: use mode node, or shared: true if it is the same on all nodes" $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
