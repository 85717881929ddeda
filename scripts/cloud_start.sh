#!/usr/bin/env bash
# Start a preset on a rented machine, or go on with it: scripts/cloud_start.sh PRESET [COMMAND ...]
#
# COMMAND is `dvc repro` unless given. The same line again goes on where the last one stopped.
# Environment:
#   WANDB_API_KEY   required: without it nobody sees what the machine is doing
#   DATA_URL, DATA_SHA256   where data.source is fetched from, for presets without data.url
#   TEACHER_SHA256, REFERENCE_SHA256   for presets that say `sha256: unknown` of their teacher or of
#                   metric.reference; `fewstep download-all --params config/PRESET.yaml` tells them
#   HF_TOKEN        sent to huggingface.co, and to no other host, for a DATA_URL behind a login
#   DISK_GB         free GB that are needed, 200 unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
    echo "cloud_start: $*" >&2
    exit 1
}

preset=${1:-}
[[ $preset =~ ^[a-z0-9][a-z0-9.-]*$ && -f config/$preset.yaml ]] ||
    stop "need a PRESET of config/, got '$preset'"
shift
[[ $# -gt 0 ]] || set -- dvc repro
[[ -n ${WANDB_API_KEY:-} ]] || stop "need WANDB_API_KEY (https://wandb.ai/authorize)"

need=${DISK_GB:-200}
free=$(($(df --output=avail -k . | tail -n 1) / 1000000))
((free >= need)) || stop "need $need GB of free disk, got $free (DISK_GB)"

# The same preset gives the same params.yaml each time, so that its trainings go on.
cp "config/$preset.yaml" params.yaml
write_sha256() { # variable, block of params.yaml: its first line, and how the line behind it begins
    local value=${!1:-}
    [[ -z $value || $value =~ ^[0-9a-f]{64}$ ]] ||
        stop "need 64 lowercase hex digits, got '$value' ($1)"
    sed -i -E "/^$2:/,/^$3/s/^( *sha256:) unknown( .*)?$/\1 ${value:-unknown}/" params.yaml
    ! sed -n -E "/^$2:/,/^$3/p" params.yaml | grep -qE '^ *sha256: unknown$' ||
        stop "need $1: $preset does not know it (config/README.md: an unknown sha256)"
}
write_sha256 TEACHER_SHA256 'teacher' '[a-z]'
write_sha256 REFERENCE_SHA256 '  reference' '(  )?[a-z]'

fewstep() {
    PYTHONPATH=src python -m fewstep "$@"
}

fetch_data() {
    local source=$1 part=$1.part curl_config=""
    [[ -n ${DATA_URL:-} && ${DATA_SHA256:-} =~ ^[0-9a-f]{64}$ ]] ||
        stop "need $source, or DATA_URL and DATA_SHA256 (64 lowercase hex digits) to fetch it"
    if [[ -n ${HF_TOKEN:-} && $DATA_URL == https://huggingface.co/* ]]; then
        curl_config="header = \"Authorization: Bearer $HF_TOKEN\"" # not seen by ps
    fi
    mkdir -p "$(dirname "$source")"
    curl --config - --fail --location --silent --show-error --retry 8 --retry-connrefused \
        --continue-at - --output "$part" "$DATA_URL" <<<"$curl_config"
    if ! echo "$DATA_SHA256  $part" | sha256sum --check --status; then
        rm "$part"
        stop "need sha256 $DATA_SHA256 of $DATA_URL, got another file, which is removed"
    fi
    mv "$part" "$source"
}

fewstep check
read -r source url < <(python -c '
import yaml
data = yaml.safe_load(open("params.yaml"))["data"]
print(data["source"], data.get("url", "-"))')
if [[ ! -e $source && $url == - ]]; then fetch_data "$source"; fi
fewstep download-all
fewstep plan

# A process group of its own: when the machine is stopped, trainings are told, and save their state.
set -m
"$@" &
child=$!
trap 'kill -TERM -- "-$child" 2>/dev/null || true' TERM INT
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    status=0
    wait "$child" || status=$?
done
exit "$status"
