"""The real dvc.yaml on config/tiny.yaml, in a copy of the repository."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def dvc(*arguments: str, cwd: Path) -> str:
    """Output of a dvc command; fails the test with that output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    run = subprocess.run(
        ["dvc", *arguments], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def ran(output: str) -> set[str]:
    """Names of the stages that a `dvc repro` ran."""
    lines = (line for line in output.splitlines() if line.startswith("Running stage"))
    return {line.split("'")[1] for line in lines}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files with the tiny preset and its own DVC cache."""
    folder = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (folder / "dvc.lock").unlink(missing_ok=True)
    shutil.copy(ROOT / "config" / "tiny.yaml", folder / "params.yaml")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "clone"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


def test_stage_names_follow_the_params(clone: Path) -> None:
    params = yaml.safe_load((clone / "params.yaml").read_text())
    names = {line.split()[0] for line in dvc("stage", "list", cwd=clone).splitlines()}
    assert names == (
        {"download-teacher", "build-lmdb", "ref-stats", "results-table"}
        | {f"train@{student}" for student in params["students"]}
        | {f"{stage}@{row}" for stage in ("generate", "fid") for row in params["rows"]}
    )


@pytest.mark.slow
def test_the_pipeline_runs_and_reruns_only_what_changed(clone: Path) -> None:
    everything = {line.split()[0] for line in dvc("stage", "list", cwd=clone).splitlines()}
    assert ran(dvc("repro", cwd=clone)) == everything
    assert (clone / "results" / "table.md").exists()
    assert ran(dvc("repro", cwd=clone)) == set(), "a second run has nothing to do"
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert status.stdout.split() == ["??", "dvc.lock"], "every out is ignored by git"

    out = dvc("exp", "run", "-S", "students.dmd2-1.lr=1.5e-4", cwd=clone)
    rows = {"generate@dmd2-1", "fid@dmd2-1"}
    assert ran(out) == {"train@dmd2-1", "results-table"} | rows
