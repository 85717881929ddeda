#!/usr/bin/env bash
# The tiny preset through workflow/profiles/slurm on a real Slurm of two nodes, on this machine alone:
# Debian's slurmctld, slurmd and munge, run as root. The teacher trains on one node, gets the warning
# of the time limit (SIGUSR1) and is cancelled later; of the students, which train on two nodes, one is
# cancelled and one requeued. All must resume, and end in the bytes of an undisturbed run.
#
#     apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
#     tests/slurm.sh [empty folder]
#
# Not part of the quick tests: ten minutes on 2 cores. Needs the project's environment on the PATH.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
conf=/etc/slurm/slurm.conf # Snakemake's plugin removes SLURM_CONF from the environment of a job
mkdir -p "$work/slurm/state"

say() { echo "slurm.sh: $*"; }
die() { say "$*" >&2; exit 1; }

start() {
    if ! munge -n >/dev/null 2>&1; then
        install -d -o munge -g munge /run/munge
        runuser -u munge -- munged
    fi
    cat >"$work/slurm/slurm.conf" <<END
ClusterName=two
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation=$work/slurm/state
SlurmctldPidFile=$work/slurm/ctld.pid
SlurmctldLogFile=$work/slurm/ctld.log
SlurmctldPort=16817
SlurmdSpoolDir=$work/slurm/spool.%n
SlurmdPidFile=$work/slurm/%n.pid
SlurmdLogFile=$work/slurm/%n.log
ReturnToService=2
NodeName=n[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
END
    ln -s "$work/slurm/slurm.conf" $conf
    slurmctld
    for node in n1 n2; do
        mkdir -p "$work/slurm/spool.$node"
        slurmd -N $node
    done
    for _ in $(seq 30); do
        [ "$(sinfo -h -t idle -o %D)" = 2 ] && return
        sleep 1
    done
    sinfo -N -l || true
    die "the nodes did not come up; see $work/slurm/*.log"
}

stop() {
    kill -INT ${snakemake:-} 2>/dev/null || true
    for pid in "$work"/slurm/{n1,n2,ctld}.pid; do
        [ -f "$pid" ] && kill "$(cat "$pid")" || true
    done
    rm -f $conf
}

checkout() { # a clone of what is committed, with trainings long enough to be stopped in the middle
    git clone -q "$root" "$work/$1"
    sed -e 's/batch_gpu: 32/batch_gpu: 16/' -e 's/checkpoint_kimg: .*/checkpoint_kimg: 100.0/' \
        -e 's/^    kimg: .*/    kimg: 6.4/' config/tiny.yaml >"$work/$1/params.yaml"
}

strike() { # once a training has logged so many rows: strike NAME ROWS RULE COMMAND...
    for _ in $(seq 600); do
        id=$(squeue -h -t R -o '%i %k' | awk -v rule="$3" '$2 == rule {print $1}')
        if [ "$(cat scratch/"$1"-*/log.* 2>/dev/null | wc -l)" -gt "$2" ] && [ -n "$id" ]; then
            say "${*:4} $id ($1), $(wc -l <"$(echo scratch/"$1"-*/log.*)") rows logged"
            "${@:4}" "$id"
            return
        fi
        sleep 1
    done
    die "$1 did not train; see $work/snakemake.log"
}

resumed() { # resumed LOG
    grep -h "resuming at" "$1" || die "it began anew: $(cat "$1")"
}

cd "$root"
checkout disturbed
checkout undisturbed
[ ! -e $conf ] || die "this machine has a Slurm: $conf"
trap stop EXIT
start
export MASTER_ADDR=127.0.0.1 # n1 and n2 are no names that resolve
cd "$work/disturbed"

say "one training over two nodes, each with one task; everything else on one"
snakemake --profile workflow/profiles/slurm --slurm-status-command squeue --slurm-no-account \
    --slurm-init-seconds-before-status-checks 5 --latency-wait 5 \
    --set-threads download_teacher=1 ref_stats=1 train=1 generate=1 fid=1 \
    --set-resources train:nodes=2 train:tasks=2 train:mpi=srun train:mem_mb=8000 train:runtime=50 \
    download_teacher:mem_mb=8000 download_teacher:runtime=50 \
    ref_stats:mem_mb=8000 fid:mem_mb=8000 \
    build_lmdb:runtime=50 generate:runtime=50 fid:runtime=50 ref_stats:runtime=50 \
    >"$work/snakemake.log" 2>&1 &
snakemake=$!

strike teacher 20 rule_download_teacher scancel --signal=USR1
strike teacher 100 rule_download_teacher scancel
strike cd 20 rule_train_wildcards_cd scancel
strike dmd2-1 20 rule_train_wildcards_dmd2-1 scontrol requeue

wait $snakemake || die "snakemake failed; see $work/snakemake.log"
cat results/table.md
for log in logs/download-teacher.log logs/train/{cd,dmd2-1}.log; do resumed "$log"; done

say "the same trainings undisturbed, by srun alone"
cd "$work/undisturbed"
export OMP_NUM_THREADS=1 PYTHONPATH=src
python -m fewstep build-lmdb
srun --nodes=1 --ntasks=1 python -m fewstep download-teacher
for student in cd dmd2-1; do
    srun --nodes=2 --ntasks-per-node=1 python -m fewstep train $student
done
for model in teacher cd dmd2-1; do
    cmp "$work"/{un,}disturbed/artifacts/models/$model/model.safetensors
    sha256sum artifacts/models/$model/model.safetensors
done
say "passed: all resumed, and ended in the same bytes"
