"""Where and from which code a result came: the commit, the machine, the versions.

None of it is reproducible, so it stands beside the results and never in an artefact that another
stage reads: a score has the same bytes wherever it is computed.
"""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fewstep.files import read_json, sha256_file, write_json
from fewstep.paths import SCRATCH

# dvc.lock and results/ are what a run writes, not what it runs
WRITTEN = (":!dvc.lock", ":!results")
EDITS = ("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
RUNS = SCRATCH / "provenance"
PACKAGES = ("torch", "numpy", "safetensors", "dvc", "snakemake")


def commit() -> str | None:
    """The commit of the current folder, with "+" where tracked files differ.

    Without a git of its own, as in the Docker image or below another repository, what
    FEWSTEP_COMMIT says; None where nothing says it. The commit of a repository around the folder
    would name code that has nothing to do with the results.
    """
    top = _top()
    if top is not None and top.samefile("."):
        try:
            return _git("rev-parse", "HEAD") + ("+" if _git(*EDITS) else "")
        except subprocess.CalledProcessError:
            pass  # nothing was committed yet
    return os.environ.get("FEWSTEP_COMMIT") or None


def no_commit() -> str:
    """Why `commit` gives none."""
    top = _top()
    if top is None:
        return "unknown: no git here, and no FEWSTEP_COMMIT"
    if top.samefile("."):
        return "unknown: nothing was committed yet, and no FEWSTEP_COMMIT"
    return "unknown: no git of this folder, only of one around it, and no FEWSTEP_COMMIT"


def _top() -> Path | None:
    """The root of the git repository that holds the current folder."""
    try:
        return Path(_git("rev-parse", "--show-toplevel"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores that may be used, memory, GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def versions() -> dict[str, str]:
    """Python's and those of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def this_run() -> dict[str, Any]:
    """All of the above, and the time; `no_commit` says why there is none."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    known = commit()
    missing = {} if known else {"no_commit": no_commit()}
    about = {"hardware": hardware(), "versions": versions(), "time": time}
    return {"commit": known, **missing, **about}


def remember(name: str, result: Path) -> None:
    """Keep beside the results where this one was computed."""
    write_json(RUNS / f"{name}.json", {"sha256": sha256_file(result), **this_run()})


def recall(name: str, result: Path) -> dict[str, Any] | None:
    """Where a result was computed; None where it came from elsewhere, DVC's cache for example."""
    file = RUNS / f"{name}.json"
    if not file.exists():
        return None
    known = read_json(file)
    return known if known.pop("sha256") == sha256_file(result) else None
