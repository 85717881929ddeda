"""A state goes on with the training that it is of: what changes its weights, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.data.sources import open_source
from fewstep.method import student_block
from fewstep.params import Params
from fewstep.paths import DATA, MODELS
from fewstep.training import fingerprint
from fewstep.training.fingerprint import Fingerprint


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    set_up(tmp_path, monkeypatch)
    return params()


def params(**overrides: Any) -> Params:  # noqa: ANN401
    return tiny_params(Path(), **{"data__source": "toy.npz", **overrides})


def of(params: Params, name: str = "cd") -> Fingerprint:
    return Fingerprint.of(name, student_block(name, params), params, ImageDataset(DATA))


def test_it_is_the_same_whenever_it_is_taken(toy: Params) -> None:
    assert of(toy).digest == of(params()).digest
    assert of(toy).facts == of(params()).facts


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("students__cd__lr", 1.0e-3),
        ("students__cd__kimg", 1.024),
        ("students__cd__settings__steps", 2),
        ("students__cd__ema", {"kind": "none"}),
        ("students__cd__phema", None),
        ("seed", 1),
        ("precision", "bf16"),
        ("noise__rho", 5.0),
    ],
)
def test_another_param_is_another_training(key: str, value: object, toy: Params) -> None:
    assert of(params(**{key: value})).digest != of(toy).digest


def test_another_student_is_another_training(toy: Params) -> None:
    assert of(toy, "dmd2-1").digest != of(toy).digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("students__cd__checkpoint_kimg", 0.032),
        ("students__cd__keep_checkpoints", 7),
        ("students__cd__max_nonfinite", 1),
        ("students__cd__validation", None),
        ("students__cd__validation__images", 16),
        ("tracking__wandb", {"mode": "offline", "project": "x"}),
        ("tracking__log_rows", 50),
        ("performance", {"layout": "contiguous", "norm": "plain"}),
        ("device", "auto"),
        ("generate__images", 32),
        ("metric__reference_images", 64),
        ("students__dmd2_1__lr", 1.0e-3),
    ],
)
def test_what_changes_no_weight_is_no_part_of_it(key: str, value: object, toy: Params) -> None:
    assert of(params(**{key: value})).digest == of(toy).digest


def test_other_data_are_another_training(toy: Params) -> None:
    before = of(toy).digest
    with np.load("toy.npz") as file:
        images, labels = file["images"], file["labels"]
    images[7, 0, 3, 3] ^= 1
    np.savez("toy.npz", images=images, labels=labels)
    d = toy.data
    build_lmdb(open_source(d.source, d.resolution, d.channels, d.classes), DATA, silent=True)
    assert of(toy).digest != before


def test_other_weights_to_start_from_are_another_training(toy: Params) -> None:
    before, teacher = of(toy), MODELS / "teacher" / "model.safetensors"
    raw = bytearray(teacher.read_bytes())
    raw[-1] ^= 1
    teacher.write_bytes(raw)
    assert of(toy).digest != before.digest
    (line,) = of(toy).differences(before.facts)
    assert line.startswith("models.teacher: ")


def test_other_code_of_the_method_is_another_training(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, identity = of(toy), fingerprint.identity

    def edited(stage: str, method: str, **rest: Any) -> dict[str, str]:  # noqa: ANN401
        return identity(stage, method, **rest) | {f"fewstep.methods.{method}": "e" * 64}

    monkeypatch.setattr(fingerprint, "identity", edited)
    assert of(toy).digest != before.digest
    (line,) = of(toy).differences(before.facts)
    assert line.startswith("code.fewstep.methods.consistency: ")
    assert line.endswith(" there, eeeeeeeeeeee now"), "hashes are cut short"


def test_differences_are_named_by_key_with_both_values(toy: Params) -> None:
    before = of(params(students__cd__lr=1.0e-3, seed=1))
    assert of(toy).differences(of(toy).facts) == []
    assert of(toy).differences(before.facts) == [
        "student.lr: 0.001 there, 0.0003 now",
        "seed: 1 there, 0 now",
    ]


def test_keys_that_one_of_them_lacks_differ_too(toy: Params) -> None:
    with_phema, without = of(toy), of(params(students__cd__phema=None))
    stds = "student.phema.stds: [0.05, 0.1] there, none now"
    assert stds in without.differences(with_phema.facts)
    assert "student.phema.stds: none there, [0.05, 0.1] now" in with_phema.differences(
        without.facts
    )
