#!/usr/bin/env bash
# Start or continue a preset on a rented machine: scripts/cloud_start.sh PRESET [COMMAND ...]
#
# COMMAND is `dvc repro` unless given. The same command continues where the last one stopped, also on a
# new machine that has artifacts, data, results and scratch: DVC's cache and the preset's dvc.lock are
# kept in scratch.
# Environment:
#   WANDB_API_KEY   required: without it nobody sees what the machine is doing
#   DATA_URL, DATA_SHA256   where data.source is fetched from, for presets without data.url
#   TEACHER_SHA256, REFERENCE_SHA256   for presets with `sha256: unknown` in teacher or
#                   metric.reference; `fewstep download-all --params config/PRESET.yaml` prints them
#   HF_TOKEN        sent to huggingface.co, and to no other host, for a DATA_URL behind a login
#   DISK_GB         required GB, free or in these four folders; by default at least 200 and what
#                   `fewstep plan` needs
#   IMAGES          number of images in the data, for that plan; 1281167 for imagenet64*
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

mkdir -p artifacts data results scratch
for folder in artifacts data results scratch; do
    [[ -w $folder ]] || stop "need $folder to be writable for user $(id -u)"
done
# A container's user may have no name and no home, without which DVC and Snakemake end in tracebacks.
whoami >/dev/null 2>&1 || export LOGNAME=${LOGNAME:-fewstep}
if [[ ! -d ${HOME:-} || ! -w ${HOME:-} ]]; then
    mkdir -p scratch/home
    export HOME=$PWD/scratch/home
fi
# Files of an earlier start count as room, because they need not be made again.
used=$({ du -Dskc artifacts data results scratch 2>/dev/null || true; } | tail -n 1 | cut -f 1)
free=$(df --output=avail -k scratch | tail -n 1)
room=$(((free + used) * 1024 / 1000000000))
need=${DISK_GB:-200}
((room >= need)) || stop "need $need GB of disk, got $room (DISK_GB)"

# The same preset gives the same params.yaml each time, so that its trainings continue.
cp "config/$preset.yaml" params.yaml
write_sha256() { # variable; block of params.yaml: its first line, and how the line after it begins
    local value=${!1:-}
    [[ -z $value || $value =~ ^[0-9a-f]{64}$ ]] ||
        stop "need 64 lowercase hex digits, got '$value' ($1)"
    sed -i -E "/^$2:/,/^$3/s/^( *sha256:) unknown( .*)?$/\1 ${value:-unknown}/" params.yaml
    ! sed -n -E "/^$2:/,/^$3/p" params.yaml | grep -qE '^ *sha256: unknown$' ||
        stop "need $1: $preset does not have it (config/README.md: an unknown sha256)"
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
        curl_config="header = \"Authorization: Bearer $HF_TOKEN\"" # hidden from ps
    fi
    mkdir -p "$(dirname "$source")"
    curl --config - --fail --location --silent --show-error --retry 8 --retry-connrefused \
        --continue-at - --output "$part" "$DATA_URL" <<<"$curl_config"
    if ! echo "$DATA_SHA256  $part" | sha256sum --check --status; then
        rm "$part"
        stop "need sha256 $DATA_SHA256 of $DATA_URL, got another file, which was removed"
    fi
    mv "$part" "$source"
}

# GPUs as nvidia-smi names them; without it, the plan uses its defaults.
describe_gpus() {
    local found kind=""
    found=$(nvidia-smi -L 2>/dev/null | grep '^GPU') || return 0
    case $found in
    *H200*) kind=h200 ;;
    *H100*) kind=h100 ;;
    *A100*40GB*) kind=a100-40 ;;
    *A100*) kind=a100 ;;
    *4090*) kind=rtx4090 ;;
    esac
    echo ${kind:+--gpu "$kind"} --gpus "$(wc -l <<<"$found")"
}

plan() {
    local images=${IMAGES:-} text short gpus nodes
    nodes=${PET_NNODES:-${NNODES:-${WORLD_SIZE:-${SLURM_JOB_NUM_NODES:-1}}}}
    [[ -n $images || $preset != imagenet64* ]] || images=1281167
    read -ra gpus < <(describe_gpus) || true
    text=$(fewstep plan "${gpus[@]}" --nodes "$nodes" --disk "$room" ${images:+--images "$images"})
    echo "$text"
    short=$(sed -n -E 's/^warning: disk: need ([0-9]+) GB.*/\1/p' <<<"$text")
    [[ -z $short || -n ${DISK_GB:-} ]] ||
        stop "need $short GB of disk for $preset, got $room: use a larger disk, or set" \
            "DISK_GB=$room to continue with this one"
}

# A container's cache is lost with the container, and the image's dvc.lock is another preset's. Without
# the cache and lock of the previous run, DVC would remove the existing models and train them again. DVC
# writes the lock after each stage, through the link, so not even SIGKILL loses one. A clone that was used
# without this script keeps its cache and starts from its own lock.
lock=scratch/$preset.dvc.lock
keep_dvc() {
    if [[ -d .dvc/cache || -n $(python -m dvc config cache.dir) ]]; then
        [[ -e $lock || ! -e dvc.lock ]] || cp dvc.lock "$lock"
    else
        python -m dvc cache dir --quiet --local scratch/dvc-cache
    fi
    [[ -s $lock ]] || echo "schema: '2.0'" >"$lock" # DVC refuses a dangling link
    ln -sfn "$lock" dvc.lock
}
return_lock() { # as a regular file again, for git
    cp --remove-destination "$lock" dvc.lock
}

fewstep check
plan
read -r source url < <(python -c '
import yaml
data = yaml.safe_load(open("params.yaml"))["data"]
print(data["source"], data.get("url", "-"))')
if [[ ! -e $source && $url == - ]]; then fetch_data "$source"; fi
fewstep download-all
keep_dvc
trap return_lock EXIT

# A separate process group: when the machine is stopped, trainings get the signal and save their state.
set -m
"$@" &
child=$!
trap 'kill -TERM -- "-$child" 2>/dev/null || true' TERM INT HUP QUIT
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    status=0
    wait "$child" || status=$?
done
exit "$status"
