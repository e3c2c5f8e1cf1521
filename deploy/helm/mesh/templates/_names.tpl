{{- define "mesh.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: mesh
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}
{{- /* Whether a handler, where it is, names no other host than the pod itself or its node's loopback. */}}
{{- define "mesh.ownHost" -}}
{{- $at := . -}}
{{- range $i, $how := list "httpGet" "tcpSocket" }}{{ if $i }} && {{ end -}}
(!has({{ $at }}.{{ $how }}) || !has({{ $at }}.{{ $how }}.host) || {{ $at }}.{{ $how }}.host in ["", "localhost", "127.0.0.1", "::1"])
{{- end -}}
{{- end }}
