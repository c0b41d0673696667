{{- define "name" -}}
{{- $name := printf "%s-%s" .Release.Name .Chart.Name -}}
{{- if contains .Chart.Name .Release.Name }}{{ $name = .Release.Name }}{{ end -}}
{{- $name | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* A number as the user wrote it: Helm reads 1000000 as a float, and would print 1e+06. */}}
{{- define "scalar" -}}
{{ if and (kindIs "float64" .) (eq . (floor .)) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{/* Seconds for the requests under way when the pod has to go. */}}
{{- define "shutdownTimeout" -}}
{{- $seconds := sub (int .Values.terminationGracePeriodSeconds) (add (int .Values.drainSeconds) 15) -}}
{{- if lt $seconds 1 }}
{{- fail (printf "terminationGracePeriodSeconds (%v) must be at least drainSeconds (%v) + 16" .Values.terminationGracePeriodSeconds .Values.drainSeconds) }}
{{- end -}}
{{ $seconds }}
{{- end }}

{{/* The arguments of the container: MODEL, then the flags in the order of their names. */}}
{{- define "arguments" -}}
- {{ .Values.model | quote }}
- --host=0.0.0.0
- --port=8000
- --tensor-parallel-size={{ include "scalar" .Values.gpus }}
{{- if not (hasKey (.Values.flags | default dict) "shutdown-timeout") }}
- --shutdown-timeout={{ include "shutdownTimeout" . }}
{{- end }}
{{- with .Values.additionalConfig }}
- {{ printf "--additional-config=%s" (toJson .) | quote }}
{{- end }}
{{- range $flag, $value := .Values.flags }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $flag | quote }}
{{- else if kindIs "map" $value }}
- {{ printf "--%s=%s" $flag (toJson $value) | quote }}
{{- else if kindIs "slice" $value }}
- {{ printf "--%s" $flag | quote }}
{{- range $value }}
- {{ include "scalar" . | quote }}
{{- end }}
{{- else }}
- {{ printf "--%s=%s" $flag (include "scalar" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}
