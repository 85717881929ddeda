"""What loads: frozen, typed, with a digest that depends on values alone."""

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from fewstep import params as module
from fewstep.methods import consistency, denoising, dmd2
from fewstep.params import ParamsError, digest, load_params
from params_edits import TINY, load_edited, load_text, put
from places import ROOT


def test_keys_of_the_build_are_optional_and_change_no_digest() -> None:
    params = load_text(TINY)
    assert (params.data.on_error, params.data.workers) == (None, None)
    assert "workers" not in params.as_dict()["data"]
    given = load_text(TINY.replace("data:\n", "data:\n  on_error: skip\n  workers: 3\n"))
    assert (given.data.on_error, given.data.workers) == ("skip", 3)
    assert replace(given, data=params.data) == params


def test_params_are_frozen() -> None:
    params = load_text(TINY)
    with pytest.raises(FrozenInstanceError):
        params.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        params.students["cd"].lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        params.students["new"] = params.students["cd"]  # pyright: ignore[reportIndexIssue]


def test_settings_are_of_the_class_that_the_method_names() -> None:
    params = load_text(TINY)
    assert isinstance(params.students["cd"].settings, consistency.Settings)
    assert isinstance(params.students["dmd2-1"].settings, dmd2.Settings)
    assert params.teacher.train and params.teacher.train.init_from is None
    assert isinstance(params.teacher.train.settings, denoising.Settings)
    assert isinstance(params.network.channel_mult, tuple)


def test_whole_numbers_are_one_value_however_written() -> None:
    as_int, as_float = (load_edited(put("students/cd/kimg", kimg)) for kimg in (48, 48.0))
    assert as_int == as_float and digest(as_int) == digest(as_float)
    assert type(as_int.students["cd"].kimg) is float
    assert type(load_edited(put("seed", 3.0)).seed) is int


def test_digest_depends_on_values_alone() -> None:
    student = load_text(TINY).students["cd"]
    assert digest(student) == digest(pickle.loads(pickle.dumps(student)))
    assert digest(student) != digest(replace(student, lr=2 * student.lr))
    assert digest({"b": (1, 2.0), "a": None}) == digest({"a": None, "b": [1, 2.0]})
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_churn_power_ema_and_a_downloaded_teacher_load() -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["teacher"] = {"url": "teacher.safetensors", "sha256": "0a" * 32}
        raw["students"]["cd"]["ema"] = {"kind": "power", "std": 0.05}
        raw["rows"]["churned"] = {
            **raw["rows"]["teacher-heun-7"],
            "sampler": "churn",
            "churn": {"S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003},
        }

    params = load_edited(edit)
    assert params.teacher.train is None and params.students["cd"].ema.std == 0.05
    assert params.rows["churned"].churn == module.Churn(40.0, 0.05, 50.0, 1.003)


def test_student_may_be_measured_at_steps_it_was_not_trained_for() -> None:
    load_edited(put("rows/dmd2-4-guided/steps", 2))


def test_relative_path_outside_the_repository_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/mine.yaml").write_text(TINY)
    assert load_params("sub/mine.yaml") == load_params(ROOT / "config" / "tiny.yaml")


def test_small_number_that_dvc_sets_is_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(TINY)
    apply_overrides("params.yaml", ["students.cd.lr=1e-5", "students.cd.kimg=12"])
    assert "lr: 1e-05" in Path("params.yaml").read_text()  # which YAML 1.1 reads as a string
    cd = load_params().students["cd"]
    assert (cd.lr, cd.kimg) == (1e-5, 12.0)


def test_optional_metrics_may_be_absent() -> None:
    assert load_params(ROOT / "config" / "tiny.yaml").metric.inception_score is None


OLD_DIGESTS = {  # of the params as one module of plain dataclasses
    "cd": "339613f545e63b722ed6554d58dedf5a4a19e2a99676f8617353e3837f872598",
    "dmd2-4": "d30c92246cf0d1cd8ed273a000c09560cceae25254447007345511f823de2dd8",
}


def test_old_digests_still_hold() -> None:
    students = load_text(TINY).students
    assert {name: digest(students[name]) for name in OLD_DIGESTS} == OLD_DIGESTS


def test_a_number_that_python_cannot_hold_is_a_problem_of_params() -> None:
    with pytest.raises(ParamsError, match=r"integer.*params.yaml: seed"):
        load_text(TINY.replace("seed: 0\n", "seed: 1.0e+300\n", 1))


def test_params_import_no_torch() -> None:
    code = "import sys, fewstep.params; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
