# What the rules share: checked params, the code that a rule depends on, what may be trusted.
import base64
import json
import os
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


def unless_recorded(*outputs):
    """params.yaml as an input, of any age where Snakemake itself made these outputs.

    Snakemake keeps the params of what it made. Of what DVC made, or made anew, it has no record or
    an old one, and would call it done whatever the params; so there it has to be newer than them.
    """

    def file(wildcards):
        known = all(_recorded(output.format(**wildcards)) for output in outputs)
        return ancient("params.yaml") if known else "params.yaml"

    return file


def _recorded(output):
    """Whether Snakemake's record is of the file that is there: its `endtime` is the file's time."""
    name = base64.urlsafe_b64encode(output.encode()).decode()
    try:
        record = json.loads(Path(".snakemake/metadata", name).read_text())
        return abs(record["endtime"] - os.lstat(output).st_mtime) < 0.01
    except (OSError, ValueError, KeyError):
        return False


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
