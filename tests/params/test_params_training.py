"""Shared training keys, and presets."""

import copy
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from fewstep.params import Params, Performance, digest, load_params, merged, merged_students, plain
from params_edits import PRESETS, TINY, Edit, load_edited, load_text, problems, put, without
from places import ROOT


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_without_a_warning(preset: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_params(preset), Params)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_yaml_1_1_and_1_2_read_the_same_preset(preset: Path) -> None:
    text = preset.read_text()
    assert YAML(typ="safe", pure=True).load(text) == yaml.safe_load(text)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_as_dict_is_the_file_and_reads_back(preset: Path) -> None:
    params = load_params(preset)
    said = merged(yaml.safe_load(preset.read_text()))
    usual = {"performance": plain(Performance()) | said.get("performance", {})}
    assert params.as_dict() == said | usual
    assert load_text(yaml.safe_dump(params.as_dict())) == params


def test_default_preset_is_params_yaml() -> None:
    """As they are committed: whoever runs the tests may have another preset in place."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git, which knows the committed params.yaml")
    show = ["git", "show", "HEAD:params.yaml", "HEAD:config/fmnist16.yaml"]
    both = subprocess.run(show, cwd=ROOT, capture_output=True, check=True).stdout
    assert both[: len(both) // 2] == both[len(both) // 2 :]


# --- shared keys ---------------------------------------------------------------------------------

VALIDATION = {"every_kimg": 0.256, "images": 32, "first_seed": 1000, "reference_images": 64}
DRAWN = {"sampler": "renoise", "steps": 1, "guidance_scale": 1.0}


def written_out() -> dict[str, Any]:
    """tiny.yaml without `training`: every key in every student."""
    return merged(yaml.safe_load(TINY))


def load_raw(raw: dict[str, Any]) -> Params:
    return load_text(yaml.safe_dump(raw))


def test_a_shared_key_equals_the_same_key_written_out() -> None:
    raw = written_out()
    assert "training" not in raw
    assert load_raw(raw) == load_text(TINY)
    assert digest(load_raw(raw)) == digest(load_text(TINY))


def test_any_key_but_those_that_make_a_student_may_be_shared() -> None:
    raw = written_out()
    cd = raw["students"]["cd"]
    shared = {key: cd.pop(key) for key in [*cd] if key not in ("method", "init_from", "settings")}
    raw["students"]["cd"], raw["training"] = cd, shared
    for name in ("dmd2-1", "dmd2-4", "mm-2"):
        raw["students"][name] |= {"validation": None, "phema": None}
    raw["teacher"]["train"] |= {"validation": None, "phema": None}
    assert load_raw(raw) == load_text(TINY)


def test_validation_is_merged_key_by_key_and_ema_replaced_whole() -> None:
    raw = written_out()
    raw["training"] = {"validation": VALIDATION | DRAWN, "ema": {"kind": "power", "std": 0.1}}
    raw["students"]["dmd2-4"]["validation"] = {"steps": 4}
    params = load_raw(raw)
    assert plain(params.students["dmd2-4"].validation) == VALIDATION | DRAWN | {"steps": 4}
    assert plain(params.students["dmd2-1"].ema) == {"kind": "none"}
    assert params.teacher.train and params.teacher.train.validation


def test_null_leaves_a_shared_key_out() -> None:
    raw = written_out()
    raw["training"] = {"validation": VALIDATION | DRAWN, "loss_scale": 2.0}
    raw["students"]["dmd2-1"] |= {"validation": None, "loss_scale": None}
    students = load_raw(raw).students
    assert students["dmd2-1"].validation is students["dmd2-1"].loss_scale is None
    assert students["dmd2-4"].loss_scale == 2.0


def test_merged_students_are_what_is_trained() -> None:
    raw = yaml.safe_load(TINY)
    params, before = load_text(TINY), copy.deepcopy(raw)
    expected = {"teacher": plain(params.teacher.train), **plain(params.students)}
    assert merged_students(raw) == expected
    assert raw == before
    raw["teacher"] = {"url": "t.safetensors", "sha256": "0a" * 32}
    assert list(merged_students(raw)) == ["cd", "dmd2-1", "dmd2-4", "mm-2"]


SHARED: dict[str, tuple[Edit, list[str]]] = {
    "wrong value": (
        put("training/weight_decay", "1e-4"),
        ["training.weight_decay: need a number >= 0, got the string '1e-4'; write 1.0e-4"],
    ),
    "item of a list": (
        put("training/betas", [0.9, 1.0]),
        ["training.betas[1]: need a number >= 0 and < 1, got 1.0"],
    ),
    "unknown key": (
        put("training/learning_rate", 1.0),
        ["training: unknown key 'learning_rate'; did you mean 'lr'?"],
    ),
    "misspelt key": (
        lambda raw: raw["training"].update(grad_klip=raw["training"].pop("grad_clip")),
        ["training: unknown key 'grad_klip'; did you mean 'grad_clip'?"],
    ),
    "settings": (
        put("training/settings", {}),
        [
            "training: unknown key 'settings'; known keys: "
            + ", ".join(
                "kimg batch batch_gpu lr lr_warmup_kimg lr_schedule lr_ref_kimg optimizer betas "
                "weight_decay grad_clip max_nonfinite nonfinite_to loss_scale dropout "
                "dropout_resolutions ema checkpoint_kimg keep_checkpoints phema validation".split()
            )
        ],
    ),
    "key of another ema": (
        lambda raw: [
            raw["training"].update(ema={"kind": "none", "std": 0.1}),
            raw["students"]["cd"].pop("ema"),
        ],
        ["training.ema: unknown key 'std'; known keys: kind"],
    ),
    "validation that some students complete": (
        lambda raw: [
            raw["training"].update(validation={"images": 1}),
            raw["students"]["dmd2-1"].update(validation=VALIDATION | DRAWN),
            raw["students"]["dmd2-4"].update(validation=None),
            raw["students"]["mm-2"].update(validation=None),
            raw["teacher"]["train"].update(validation=None),
        ],
        ["training.validation.images: need an integer >= 2, got 1"],
    ),
    "validation that a student does not complete": (
        lambda raw: [
            raw["training"].update(validation=VALIDATION),
            raw["students"]["dmd2-1"].update(validation=None),
            raw["students"]["dmd2-4"].update(validation={"sampler": "renoise", "steps": 4}),
            raw["students"]["mm-2"].update(validation=None),
            raw["teacher"]["train"].update(validation=None),
        ],
        [
            "students.dmd2-4.validation.guidance_scale: need a number: classifier-free "
            "guidance; 1 = off, got no such key"
        ],
    ),
    "key that neither has": (
        without("training/keep_checkpoints"),
        [
            f"{where}.keep_checkpoints: need an integer >= 1: newest checkpoints that are kept "
            "beside the best, got no such key"
            for where in (
                "teacher.train",
                *(f"students.{s}" for s in ("cd", "dmd2-1", "dmd2-4", "mm-2")),
            )
        ],
    ),
    "no mapping": (
        lambda raw: [raw.update(written_out()), raw.update(training=[])],
        ["training: need a mapping, got []"],
    ),
    "nothing": (
        lambda raw: [raw.update(written_out()), raw.update(training=None)],
        ["training: need a mapping, got nothing"],
    ),
}


def with_its_key(line: str) -> str:
    """`a.b: need ...` as messages show it."""
    key, _, message = line.partition(": ")
    return f"{message} (params.yaml: {key})"


@pytest.mark.parametrize("case", SHARED)
def test_a_problem_of_a_shared_key_is_told_once_and_where_it_stands(case: str) -> None:
    edit, expected = SHARED[case]
    assert sorted(problems(edit)) == sorted(map(with_its_key, expected))


def test_a_conflict_names_the_key_where_it_stands() -> None:
    def edit(raw: dict[str, Any]) -> None:
        for student in (*raw["students"].values(), raw["teacher"]["train"]):
            del student["batch_gpu"]
        raw["training"]["batch_gpu"] = 24

    assert problems(edit) == [
        "need batch divisible by batch_gpu, got 32 and 24; a batch_gpu of 16 or 32 would do "
        "(params.yaml: training.batch_gpu)"
    ]


def test_yaml_traps_are_found_in_training() -> None:
    with pytest.raises(ValueError, match=r"^YAML 1.1 and .*training.max_nonfinite\)"):
        load_text(TINY.replace("max_nonfinite: 20", "max_nonfinite: 010"))


def test_training_may_be_empty() -> None:
    assert load_edited(lambda raw: raw.update(written_out(), training={})) == load_text(TINY)


def test_what_training_leaves_open_is_missing_where_it_is_needed() -> None:
    """A validation that is shared but for its sampler, inherited by a student that adds none."""
    raw = yaml.safe_load(TINY)
    raw["training"] = {"validation": {"every_kimg": 0.256, "images": 16, "first_seed": 1000}}
    raw["students"]["cd"].pop("validation", None)
    lines = problems(lambda given: given.update(raw))
    assert any("need one of heun" in li and "students.cd.validation.sampler)" in li for li in lines)
