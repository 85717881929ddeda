"""Rows: their images follow from seeds alone; what was begun is gone on with, or not used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import EDM
from experiment import set_up, tiny_params
from fewstep.distributed import Rank
from fewstep.files import read_json
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.weights import load_model, read_safetensors, save_model
from fewstep.params import Params, Performance, Row
from fewstep.paths import MODELS, SAMPLES, SCRATCH
from fewstep.sampling import batches, row
from fewstep.stages import generate
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SeededNoise

ROW = "teacher-euler-4"
CPU = torch.device("cpu")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch)


@pytest.mark.parametrize("sampler", ["heun", "euler", "ddim", "renoise", "ancestral"])
def test_images_depend_on_their_seed_not_on_the_batch(toy: Params, sampler: str) -> None:
    images = []
    for batch, first, count in [(8, 0, 8), (3, 0, 8), (2, 5, 3)]:
        overrides = {f"rows__{ROW}__sampler": sampler, "generate__images": count}
        split = {"generate__batch": batch, "generate__first_seed": first}
        params = tiny_params(Path(), **overrides, **split)
        generate.run(params, ROW)
        with np.load(SAMPLES / f"{ROW}.npz") as samples:
            images.append(samples["images"].astype(int))
            assert list(samples["seeds"]) == list(range(first, first + count))
    assert np.abs(images[0] - images[1]).max() <= 1, "a grey level of rounding"
    assert np.abs(images[0][5:8] - images[2]).max() <= 1


def test_labels_are_balanced_or_drawn_from_the_seed(toy: Params) -> None:
    for policy, expected in [("balanced", [0, 1, 2, 3, 4, 5]), ("random", None)]:
        params = tiny_params(Path(), generate__labels=policy, generate__images=6)
        generate.run(params, ROW)
        with np.load(SAMPLES / f"{ROW}.npz") as samples:
            labels = samples["labels"].tolist()
        assert labels == expected if expected else labels != [0, 1, 2, 3, 4, 5]


def test_an_interrupted_row_goes_on_with_the_batches_it_has(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny_params(Path(), generate__images=10, generate__batch=4, generate__seed_ranges=2)
    generate.run(params, ROW)
    whole = (SAMPLES / f"{ROW}.npz").read_bytes()
    asked: list[range] = []

    class DiesAtTheThird(SeededNoise):
        def __init__(self, seeds: range, *rest: Any) -> None:  # noqa: ANN401
            asked.append(seeds)
            if len(asked) == 3:
                raise KeyboardInterrupt
            super().__init__(seeds, *rest)

    monkeypatch.setattr(batches, "SeededNoise", DiesAtTheThird)
    with pytest.raises(KeyboardInterrupt):
        generate.run(params, ROW)
    generate.run(params, ROW)
    assert asked[2:] == [range(8, 10), range(8, 10), range(10, 14), range(14, 18), range(18, 20)]
    assert (SAMPLES / f"{ROW}.npz").read_bytes() == whole
    assert not (SCRATCH / "samples" / ROW).exists()


@pytest.mark.parametrize("change", [{f"rows__{ROW}__steps": 3}, {"generate__labels": "random"}])
def test_batches_of_other_params_are_not_used(toy: Params, change: dict[str, object]) -> None:
    folders = [
        row.fingerprint(params, params.rows[ROW], CPU)
        for params in (tiny_params(Path()), tiny_params(Path(), **change))
    ]
    assert folders[0] != folders[1]


def test_batches_of_other_code_are_not_used(toy: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    before = row.fingerprint(toy, toy.rows[ROW], CPU)
    assert row.fingerprint(toy, toy.rows[ROW], CPU) == before
    monkeypatch.setattr(row, "identity", lambda stage: {"fewstep.theory.sample": "e" * 64})
    assert row.fingerprint(toy, toy.rows[ROW], CPU) != before


def test_batches_of_another_model_are_not_used(toy: Params) -> None:
    before = row.fingerprint(toy, toy.rows[ROW], CPU)
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    weights["model.out_conv.bias"] += 1
    save_model(MODELS / "teacher", weights, about)
    assert row.fingerprint(toy, toy.rows[ROW], CPU) != before


def test_images_that_are_not_finite_stop_the_row(toy: Params) -> None:
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    weights["model.out_conv.bias"].fill_(float("nan"))
    save_model(MODELS / "teacher", weights, about)
    with pytest.raises(
        FloatingPointError, match="teacher gave images that are not finite: euler, 4 steps"
    ):
        generate.run(toy, ROW)
    assert not (SAMPLES / f"{ROW}.npz").exists()


def test_images_come_batch_by_batch_as_each_is_done(toy: Params) -> None:
    denoiser, _ = load_model("teacher", toy)
    how, seeds, begun = Row("teacher", "euler", 1, 1.0), range(20), list[range]()
    parts = (begun.append(part) or part for part in batches.batches(seeds, 8))
    done: list[int] = []
    images, classes = list[np.ndarray](), list[int]()
    for part_images, part_classes in batches.generate_batches(toy, how, denoiser, EDM, parts, CPU):
        done.append(len(part_images))
        images.append(part_images)
        classes += list(part_classes)
        assert len(begun) == len(done), "none was begun that could be lost"
    assert done == [8, 8, 4] and np.concatenate(images).shape == (20, 1, 16, 16)
    assert classes == [i % 10 for i in seeds]


def test_a_row_is_drawn_on_the_grid_that_its_model_names(toy: Params) -> None:
    """Whatever the params say of their students: the model knows how it was trained."""
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    own = {"sampler": "euler", "steps": 4, "sigma_min": 0.1, "sigma_max": 2.5, "rho": 7.0}
    save_model(MODELS / "teacher", weights, {**about, "sampling": own})
    generate.run(toy, ROW)
    with np.load(SAMPLES / f"{ROW}.npz") as samples:
        drawn = samples["images"][:8]
    how, denoiser = toy.rows[ROW], load_model("teacher", toy)[0]
    grid = Schedule(0.1, 2.5, 7.0)
    [(images, _)] = batches.generate_batches(toy, how, denoiser, grid, [range(8)], CPU)
    assert np.abs(drawn.astype(int) - images).max() <= 1
    said = read_json(SAMPLES / f"{ROW}.json")
    assert (said["sigma_min"], said["sigma_max"]) == (0.1, 2.5)


def test_a_grid_that_is_none_is_refused(toy: Params) -> None:
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    save_model(MODELS / "teacher", weights, {**about, "sampling": {"sigma_max": "80"}})
    with pytest.raises(ValueError, match="need sigma_min, sigma_max and rho in `sampling`"):
        generate.run(toy, ROW)


def test_kernels_of_a_row_are_compiled_by_one_process_of_a_node_first(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the number of images that a batch gives them, which guidance doubles."""
    order: list[str] = []
    monkeypatch.setattr("fewstep.distributed.barrier", lambda rank: order.append("barrier"))
    monkeypatch.setattr(row, "barrier", lambda rank: None)
    monkeypatch.setattr(row, "sample_parts", lambda *_: order.append("sample"))
    compiled = replace(toy, performance=Performance(compile="blocks"))
    guided = {**toy.rows, ROW: replace(toy.rows[ROW], guidance_scale=2.0)}

    def accelerate(denoiser: Denoiser, *_: object, frozen: bool) -> Denoiser:
        forward = denoiser.forward

        def counted(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            order.append(f"compile {len(x)}")
            return forward(x[:1], sigma[:1], labels[:1])

        monkeypatch.setattr(denoiser, "forward", counted)
        return denoiser

    monkeypatch.setattr(row, "accelerate", accelerate)
    batch = min(toy.generate.batch, toy.generate.images)
    row.draw_row(ROW, compiled, Rank(1, 2, CPU, 1))
    row.draw_row(ROW, replace(compiled, rows=guided), Rank(1, 2, CPU, 1))
    assert order[:3] == ["barrier", f"compile {batch}", "sample"]
    assert order[3:] == ["barrier", f"compile {2 * batch}", "sample"]
    order.clear()
    row.draw_row(ROW, toy, Rank(1, 2, CPU, 1))
    assert order == ["sample"], "nothing is compiled"


def test_the_copy_of_a_batch_begins_before_the_next_one_is_launched(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that began later would wait for the next batch, too."""
    order: list[str] = []
    draw, copy = batches.sample, batches.to_host
    monkeypatch.setattr(batches, "sample", lambda *a: order.append("launch") or draw(*a))
    monkeypatch.setattr(batches, "to_host", lambda values: order.append("copy") or copy(values))
    denoiser, _ = load_model("teacher", toy)
    parts = [range(2), range(2, 4)]
    list(batches.generate_batches(toy, toy.rows[ROW], denoiser, EDM, parts, CPU))
    assert order == ["launch", "copy", "copy"] * 2
