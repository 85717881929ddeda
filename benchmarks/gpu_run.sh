#!/usr/bin/env bash
# The whole experiment of a preset on one GPU, without DVC, Snakemake or the network:
#   benchmarks/gpu_run.sh OUT [DATA] [PRESET]
#
# OUT gets the results, the logs, the seconds of each stage and the models of config/fmnist32.yaml, or
# of PRESET, a params file. DATA is what data.source names there, carried along; without it, the
# preset's own path is used. Only torch has to be installed: the other dependencies of pyproject.toml,
# but for dvc, dvclive, wandb and snakemake, are installed from the wheels in folder WHEELS, if that is
# set (made elsewhere by `pip download --dest WHEELS`).
#
# The order is that of dvc.yaml. Students share the GPU, and then rows do: one alone leaves much of it
# idle. Each stage may take the seconds below, times SLOWER (default 1). What fails or is late stops
# only what needs it: the table has the rows that were scored. Exit status 1 if there are others.
set -uo pipefail

DATA_SECONDS=40 TEACHER_SECONDS=150 STUDENT_SECONDS=170 ROW_SECONDS=60 TABLE_SECONDS=30

out=${1:?need a folder for the results} data=${2:-} preset=${3:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
preset=$(realpath "${preset:-$root/config/fmnist32.yaml}")
mkdir -p "$out/logs"
out=$(realpath "$out")
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ -z ${FEWSTEP_COMMIT:-} ]]; then
    FEWSTEP_COMMIT=$(git -C "$root" describe --always --abbrev=40 --dirty=+ --exclude '*' 2>/dev/null)
fi
export FEWSTEP_COMMIT
if [[ -n ${WHEELS:-} ]]; then
    python3 -m pip install --quiet --no-index --no-deps --target "$out/packages" "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$out/packages
fi

work=$(mktemp -d)
trap 'rm -rf "$work" "$out/packages"' EXIT
ln -s "$root/assets" "$work/assets"
source='  source:' # of data, the only key of that name and depth
sed -E "s|^($source) [^ ]+|\1 ${data:+$(realpath "${data:-.}")}|" "$preset" >"$work/params.yaml"
[[ -n $data ]] || cp "$preset" "$work/params.yaml"
cd "$work" || exit 1
: >"$out/stages.txt"

stage() { # seconds, stage, arguments: runs it, notes when, how long, and how it ended
    local limit=$(($1 * ${SLOWER:-1})) began=$SECONDS status=0 note=""
    shift
    local what="$*"
    local log=$out/logs/${what//[ \/]/-}.txt
    timeout --kill-after=20 "$limit" python3 -m fewstep "$@" >"$log" 2>&1 || status=$?
    [[ $status = 0 ]] || note=", failed ($status): $(tail -n 1 "$log")"
    printf '%4d s: %s took %d s%s\n' "$began" "$what" $((SECONDS - began)) "$note" | tee -a "$out/stages.txt"
    return "$status"
}

python() {
    python3 -c "import sys; from fewstep.params import load_params
params = load_params('params.yaml')
$1"
}

row() {
    stage $ROW_SECONDS generate "$1" && stage $ROW_SECONDS fid "$1"
}

stage $DATA_SECONDS check && stage $DATA_SECONDS code && stage $DATA_SECONDS build-lmdb || exit 1
stage $DATA_SECONDS ref-stats &
stage $TEACHER_SECONDS download-teacher || exit 1
for student in $(python "print(*[n for n, s in params.students.items() if s.init_from == 'teacher'])"); do
    stage $STUDENT_SECONDS train "$student" &
done
wait
for student in $(python "print(*[n for n, s in params.students.items() if s.init_from != 'teacher'])"); do
    stage $STUDENT_SECONDS train "$student"
done
for name in $(python "print(*params.rows)"); do
    row "$name" &
done
wait

# what was scored, and the students that were trained
python3 - <<'END'
from pathlib import Path
import yaml
raw = yaml.safe_load(Path("params.yaml").read_text())
made = lambda name: Path(f"artifacts/models/{name}/log.jsonl").exists()
raw["students"] = {name: block for name, block in raw["students"].items() if made(name)}
raw["rows"] = {n: row for n, row in raw["rows"].items() if Path(f"artifacts/scores/{n}.json").exists()}
Path("scored.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
END
stage $TABLE_SECONDS results-table --params scored.yaml
cp -r results artifacts/scores artifacts/data.json artifacts/ref-stats.json params.yaml "$out" 2>/dev/null
cp -r scratch/times scratch/provenance artifacts/models "$out" 2>/dev/null
cat results/table.md "$out/stages.txt"
! grep -q ', failed' "$out/stages.txt"
