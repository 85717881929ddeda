"""Commands that come too early name the one that comes first."""

from pathlib import Path

import pytest
import yaml

from experiment import set_up, tiny_params
from fewstep.cli import main
from fewstep.params import Params
from fewstep.planning.order import needs
from places import ROOT


@pytest.mark.parametrize(
    ("command", "file", "first"),
    [
        (["ref-stats"], "artifacts/data.lmdb", "build-lmdb"),
        (["download-teacher"], "artifacts/data.lmdb", "build-lmdb"),
        (["train", "dmd2-4"], "artifacts/models/cd/model.safetensors", "train cd"),
        (["train", "cd"], "artifacts/models/teacher/model.safetensors", "download-teacher"),
        (["generate", "cd-4"], "artifacts/models/cd/model.safetensors", "train cd"),
        (["generate", "cd-4-best"], "artifacts/models/cd@best/model.safetensors", "train cd"),
        (["fid", "cd-4"], "artifacts/samples/cd-4.npz", "generate cd-4"),
        (["results-table"], "artifacts/scores/mm-2.json", "fid mm-2"),
        (["phema", "cd", "--std", "0.1"], "artifacts/snapshots/cd", "train cd"),
    ],
)
def test_a_command_out_of_order_names_the_one_that_makes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], file: str, first: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_params(tmp_path)
    with pytest.raises(
        SystemExit, match=f"need {file}, got nothing there; make it with `fewste"
    ) as s:
        main(command)
    assert f"need {file}, got nothing there; make it with `fewstep {first}`" in str(s.value)


def test_what_is_there_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = set_up(tmp_path, monkeypatch, images=16)
    assert all(path.exists() for path, _ in needs("train", params, "cd"))
    assert needs("build-lmdb", params) == needs("generate", params, "nobody") == []


def test_the_order_is_that_of_the_pipeline(tmp_path: Path) -> None:
    """What a stage of dvc.yaml depends on, apart from code, settings and the source."""
    params = tiny_params(tmp_path)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    jobs = [("ref-stats", None), ("train", "dmd2-4"), ("generate", "cd-4"), ("fid", "cd-4")]
    for stage, name in jobs:
        block = stages[stage].get("do", stages[stage])
        deps = {_filled(dep, params, stage, name) for dep in block["deps"] if "${code}" not in dep}
        wanted = {str(path) for path, _ in needs(stage, params, name)}
        assert {dep for dep in deps if "settings" not in dep} == wanted, stage


def _filled(text: str, params: Params, stage: str, name: str | None) -> str:
    values = {"${models}": "artifacts/models", "${key}": str(name)}
    if stage == "train":
        values["${item.init_from}"] = str(params.students[str(name)].init_from)
    if stage == "generate":
        values["${item.model}"] = params.rows[str(name)].model
    for key, value in values.items():
        text = text.replace(key, value)
    return text
