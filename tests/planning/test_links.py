"""Links to another disk are told before any work, with what works instead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiment import tiny_params
from fewstep.cli import main
from fewstep.planning.links import refused_by_dvc
from places import ROOT


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, and a disk beside it."""
    folder = tmp_path / "clone"
    for name in (".git", ".dvc", "artifacts/models", "results"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(folder)
    return folder


def link(name: str, to: str = "../disk") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if Path(name).is_dir():
        subprocess.run(["rm", "-r", name], check=True)
    Path(name).symlink_to(Path(to).absolute())


@pytest.mark.parametrize(
    "name", ["artifacts", "results", "artifacts/models", "artifacts/models/cd"]
)
def test_a_link_to_another_disk_is_named_with_what_works(name: str, clone: Path) -> None:
    link(name)
    (line,) = refused_by_dvc()
    assert f"need {name} in this repository, got a link to {clone.parent / 'disk'}" in line
    assert f"dvc cache dir --local {clone.parent / 'disk' / 'dvc-cache'}" in line
    assert "dvc config --local cache.type symlink" in line


def test_what_dvc_takes_is_not_named(clone: Path) -> None:
    for name in ("scratch", "data"):  # no outputs
        link(name)
    for name in ("artifacts/code", "artifacts/data.lmdb"):  # outputs, which DVC replaces
        link(name)
    (clone / "inside").mkdir()
    link("results", "inside")
    assert refused_by_dvc() == []
    link("artifacts")
    assert len(refused_by_dvc()) == 1
    (clone / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    assert refused_by_dvc() == []
    (clone / ".dvc" / "config").unlink()
    (clone / ".git").rmdir()
    assert refused_by_dvc() == []


def test_check_says_it_and_no_stage_of_dvc_starts(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_params(clone)
    link("artifacts")
    main(["check"])
    assert "\nwarning: need artifacts in this repository" in capsys.readouterr().out
    monkeypatch.setenv("DVC_STAGE", "train@cd")
    with pytest.raises(SystemExit, match="fewstep train: need artifacts in this repository"):
        main(["train", "cd"])


@pytest.mark.slow  # DVC twice
def test_dvc_refuses_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If DVC itself did not refuse it any more, neither should we."""
    for name in ("work", "disk"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"]):
        subprocess.run(command, check=True)
    Path("artifacts").symlink_to(tmp_path / "disk")
    Path("dvc.yaml").write_text(
        "stages: {s: {cmd: echo 1 > artifacts/one, outs: [artifacts/one]}}\n"
    )
    done = subprocess.run([*dvc, "repro"], capture_output=True, text=True)
    assert done.returncode and "outside of git repository" in done.stderr and refused_by_dvc()
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    Path("dvc.yaml").write_text("stages: {s: {cmd: python -m fewstep train cd, outs: [results]}}\n")
    done = subprocess.run([*dvc, "repro"], capture_output=True, text=True, env=environ)
    assert done.returncode and "fewstep train: need artifacts in this repository" in done.stderr
