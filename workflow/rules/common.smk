# What the rules share: checked params, the code that a rule depends on, what may be trusted.
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
from fewstep.params import ParamsError, load_params

try:
    load_params("params.yaml")
except ParamsError as error:
    raise WorkflowError(f"{error}") from None
if config != load_configfile("params.yaml"):
    raise WorkflowError(
        "need all params in params.yaml, got others by --config or --configfile, which no stage "
        "reads (edit params.yaml, or copy a preset there)"
    )

# Slurm's warning before the time limit goes to every process of a step. The trainer saves its state
# then, and Snakemake around it has to live until that is done.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
# So has the shell, which SIGTERM would end at once: there is none between Snakemake and a stage.
shell.prefix("set -euo pipefail; exec ")

ALL_CORES = 1024  # clamped to --cores: a job has the whole machine, as under DVC
GPU = int(config["device"] != "cpu")


def one_of(names):
    """Exactly these names, as the constraint of a wildcard."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    imported=one_of(config["imports"]),
    student=one_of(config["students"]),
    row=one_of(config["rows"]),


def code(*patterns):
    """Source files as inputs. Snakemake misses edits below a folder, hence patterns."""
    found = [sorted(Path("src/fewstep").glob(pattern)) for pattern in patterns]
    if [] in found:
        raise WorkflowError(f"need source files, got none at {patterns[found.index([])]}")
    return [str(file) for files in found for file in files]


def tracked(*keys):
    """Parts of params.yaml, by dotted key, whose change reruns the rule: `params:` in dvc.yaml."""

    def values(wildcards):
        paths = [[p.format(**wildcards) for p in key.split(".")] for key in keys]
        return {".".join(p): reduce(lambda block, k: block[k], p, config) for p in paths}

    return values


def unless_recorded(output):
    """params.yaml as an input, of any age where Snakemake itself made this output.

    Snakemake keeps the params of what it made. Of what DVC made it has no record, and would call it
    done whatever the params; so there it has to be newer than them.
    """

    def file(wildcards):
        known = _record(output.format(**wildcards)).exists()
        return ancient("params.yaml") if known else "params.yaml"

    return file


def forget_replaced():
    """Drop Snakemake's records of files that something else has made anew since.

    Else params that were changed, run by DVC and changed back would find the old record to agree.
    """
    for record in Path(".snakemake/metadata").glob("*"):
        try:
            output = Path(base64.urlsafe_b64decode(record.name).decode())
            recorded = json.loads(record.read_text())["endtime"]
            stamp = output / ".snakemake_timestamp"  # Snakemake's time of a folder
            made = (stamp if stamp.exists() else output).stat().st_mtime
        except (OSError, ValueError, KeyError):
            continue
        if abs(made - recorded) > 0.01:
            record.unlink(missing_ok=True)


def _record(output):
    return Path(".snakemake/metadata", base64.urlsafe_b64encode(output.encode()).decode())


if workflow.is_main_process:
    forget_replaced()


def model_of(wildcards):
    """The model that a file of the report is about."""
    row = wildcards.get("row")
    return config["rows"][row]["model"] if row else wildcards.student


def method_of(wildcards):
    """A category of the report: how that model was trained."""
    model = model_of(wildcards)
    if model in config["students"]:
        return f"Method {config['students'][model]['method']}"
    return "Teacher" if model == "teacher" else "Imported models"


def labels_of(what):
    """The columns by which the report finds a file of a category."""

    def labels(wildcards):
        return {"model": model_of(wildcards), "row": wildcards.get("row", ""), "shows": what}

    return labels
