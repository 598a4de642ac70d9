{{- define "covey.name" -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "covey.labels" -}}
app.kubernetes.io/name: covey
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "covey.selector" -}}
app.kubernetes.io/name: covey
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "covey.environment" -}}
{{- with .Values.databaseSecret }}
env:
  - name: COVEY_DATABASE_URL
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: url
{{- end }}
{{- end -}}

{{- define "covey.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end -}}
