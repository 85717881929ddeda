"""A model of ours that is imported is still sampled as it was trained to be."""

from pathlib import Path

import pytest

from experiment import tiny_params
from fewstep.files import read_json, sha256_file
from fewstep.interop.install import install
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import read_safetensors, save_model
from fewstep.params import Import
from fewstep.paths import MODELS
from fewstep.stages import import_
from fewstep.theory.noise import Schedule


@pytest.mark.parametrize("how", ["by the command", "by the params"])
def test_an_imported_student_keeps_its_sampling(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params, file = tiny_params(tmp_path), Path("ours/model.safetensors")
    sampling = params.students["mm-2"].settings.sampled(params.noise)
    about = {"name": "ours", "sampling": sampling}
    save_model(file.parent, build_denoiser(params).state_dict(), about)
    if how == "by the command":
        import_.run(params, str(file), MODELS / "theirs")
    else:
        install("theirs", Import(str(file), sha256_file(file)), params)
    kept = read_json(MODELS / "theirs" / "model.json")
    assert kept == read_safetensors(MODELS / "theirs" / "model.safetensors")[1]
    assert kept["sampling"] == sampling
    assert Schedule.of_model(kept, params.noise) == Schedule(0.002, 10.0, 7.0)
