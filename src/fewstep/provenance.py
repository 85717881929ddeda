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

# dvc.lock is what a run writes, not what it runs
EDITS = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
RUNS = Path("scratch/provenance")
PACKAGES = ("torch", "numpy", "safetensors", "dvc", "snakemake")


def commit() -> str | None:
    """The commit of the current folder, with "+" where tracked files differ.

    Without git, as in the Docker image, what FEWSTEP_COMMIT says; None where nothing says it.
    """
    try:
        found = _git("rev-parse", "HEAD")
        return found + ("+" if _git(*EDITS) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FEWSTEP_COMMIT") or None


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
    """Python's and those of the packages that results hang on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def this_run() -> dict[str, Any]:
    """All of the above, and the time."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "hardware": hardware(), "versions": versions(), "time": time}


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
