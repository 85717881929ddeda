# Shared by the rules: checked params, the code a rule depends on, which outputs may be trusted.
import base64
import json
import re
import signal
import sys
from functools import reduce
from pathlib import Path

from snakemake.common.configfile import load_configfile
from snakemake.exceptions import WorkflowError

sys.path.insert(0, "src")
from fewstep.code import write_identities
from fewstep.data.watched import watch
from fewstep.params import ParamsError, load_params
from fewstep.paths import trained

try:
    load_params("params.yaml")
except ParamsError as error:
    raise WorkflowError(f"{error}") from None
if config != load_configfile("params.yaml"):
    raise WorkflowError(
        "need all params in params.yaml, got others by --config or --configfile, which no stage "
        "reads (edit params.yaml, or copy a preset there)"
    )

# Slurm sends its warning before the time limit to every process of a step. The trainer then saves
# its state, and Snakemake must stay alive until it has.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# SIGTERM would end a shell at once, so none may stand between Snakemake and a stage: `exec`.
shell.prefix("set -euo pipefail; exec ")

SOURCE = Path(config["data"]["source"])
WATCHED = Path("scratch/source.json")
ALL_CORES = 1024  # clamped to --cores: a job gets the whole machine, as under DVC
GPU = int(config["device"] != "cpu")


def one_of(names):
    """Exactly these names, as the constraint of a wildcard."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    imported=one_of(config["imports"]),
    student=one_of(config["students"]),
    row=one_of(config["rows"]),


def code(stage):
    """The file with the hashes of the code that decides a stage; stage `code` writes it under DVC."""
    return f"artifacts/code/{stage}.json"


def source():
    """data.source as inputs: a file, or a folder with a file that changes when anything below does."""
    return [ancient(str(SOURCE)), str(WATCHED)] if SOURCE.is_dir() else [str(SOURCE)]


def tracked(*keys):
    """Parts of params.yaml, by dotted key, whose change reruns the rule: `params:` in dvc.yaml."""

    def values(wildcards):
        paths = [[p.format(**wildcards) for p in key.split(".")] for key in keys]
        return {".".join(p): reduce(lambda block, k: block[k], p, config) for p in paths}

    return values


def unless_recorded(output):
    """params.yaml as an input, whose age matters only where Snakemake has no record of the output.

    Snakemake records the params of what it made. It has no record of what DVC made, and would
    consider it done whatever the params; so such an output must be newer than params.yaml.
    """

    def file(wildcards):
        known = _record(output.format(**wildcards)).exists()
        return ancient("params.yaml") if known else "params.yaml"

    return file


def forget_replaced():
    """Drop Snakemake's records of files that something else has remade since.

    Otherwise, after params are changed, run by DVC and changed back, the old record would match.
    """
    for record in Path(".snakemake/metadata").glob("*"):
        try:
            output = Path(base64.urlsafe_b64decode(record.name).decode())
            recorded = json.loads(record.read_text())["endtime"]
            stamp = output / ".snakemake_timestamp"  # where Snakemake keeps the time of a folder
            made = (stamp if stamp.exists() else output).stat().st_mtime
        except (OSError, ValueError, KeyError):
            continue
        if abs(made - recorded) > 0.01:
            record.unlink(missing_ok=True)


def _record(output):
    return Path(".snakemake/metadata", base64.urlsafe_b64encode(output.encode()).decode())


if workflow.is_main_process:
    forget_replaced()
    # Not in a rule: after a rule that ran, Snakemake reruns everything downstream, whatever the
    # rule wrote.
    write_identities("params.yaml")
    if SOURCE.is_dir():
        try:
            watch(SOURCE, WATCHED)
        except ValueError as error:
            raise WorkflowError(f"{error}") from None


def drawn_by(wildcards):
    """The model of a row: a file, or the folder NAME@best, an output as a whole."""
    model = config["rows"][wildcards.row]["model"]
    folder = f"artifacts/models/{model}"
    return f"{folder}/model.safetensors" if trained(model) == model else folder


def model_of(wildcards):
    """The model that a file in the report belongs to."""
    row = wildcards.get("row")
    return config["rows"][row]["model"] if row else wildcards.student


def method_of(wildcards):
    """The report category: how that model was trained."""
    model = trained(model_of(wildcards))
    if model in config["students"]:
        return f"Method {config['students'][model]['method']}"
    return "Teacher" if model == "teacher" else "Imported models"


def labels_of(what):
    """The columns that identify a file within its category of the report."""

    def labels(wildcards):
        return {"model": model_of(wildcards), "row": wildcards.get("row", ""), "shows": what}

    return labels
