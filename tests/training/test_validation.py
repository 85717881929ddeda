"""Validation is what the stages do, on any number of ranks, and leaves training as it was."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from conftest import EDM
from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.files import read_json
from fewstep.metrics.manifold import manifold
from fewstep.metrics.reference import real_images
from fewstep.networks.layers import UNetBlock
from fewstep.networks.weights import load_model
from fewstep.params import Baseline, Download, Generate, Params, Row, Validation, load_params
from fewstep.paths import DATA, SAMPLES, SCORES
from fewstep.stages import fid, generate, ref_stats
from fewstep.training.validation import Validator

ROW = "teacher-euler-4"
ALONE = Rank(0, 1, torch.device("cpu"))
SETTINGS = Validation(0.1, 20, 5, 120, "ddim", 2, 1.0)

pytestmark = pytest.mark.filterwarnings("ignore:need 113 images")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    set_up(tmp_path, monkeypatch)
    return experiment()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def experiment() -> Params:
    """That of the current folder; rows have 20 images from seed 5, against 120 real ones."""
    params = load_params()
    return replace(
        params,
        generate=Generate(20, 8, 5, "balanced"),
        metric=replace(params.metric, reference_images=120),
    )


def validator(params: Params, **changes: Any) -> Validator:  # noqa: ANN401
    return Validator(params, replace(SETTINGS, **changes), EDM, ImageDataset(DATA), ALONE)


def staged(params: Params, row: Row) -> float:
    """The value that the stages give for that row."""
    params = replace(params, rows=MappingProxyType({"row": row}))
    ref_stats.run(params)
    generate.run(params, "row")
    fid.run(params, "row")
    return read_json(SCORES / "row.json")["value"]


# --- the same code -----------------------------------------------------------------------------


def test_a_score_is_what_the_stages_give(toy: Params) -> None:
    row = Row("teacher", "renoise", 2, 1.5)
    v = validator(toy, sampler=row.sampler, guidance_scale=row.guidance_scale)
    denoiser, _ = load_model("teacher", toy)
    value, images, _ = v.student(denoiser, "teacher")
    assert value == pytest.approx(staged(toy, row), rel=1e-5)
    with np.load(SAMPLES / "row.npz") as samples:
        np.testing.assert_array_equal(samples["images"], images)


def test_the_teachers_score_is_that_of_its_own_row(toy: Params) -> None:
    """Sampled as `teacher` says and without guidance, whatever the student's settings."""
    base = Baseline("heun", 3)
    denoiser, _ = load_model("teacher", toy)
    score = validator(toy, guidance_scale=2.0, steps=1).teacher(denoiser, base)
    assert score.value == pytest.approx(staged(toy, Row("teacher", "heun", 3, 1.0)), rel=1e-5)


def test_a_score_is_repeatable_and_tells_networks_apart(toy: Params) -> None:
    v, (denoiser, _) = validator(toy), load_model("teacher", toy)
    first, images, signs = v.student(denoiser, "cd")
    torch.rand(3)
    again, same, too = v.student(denoiser, "cd")
    assert first == again and np.array_equal(images, same) and signs == too
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.1)
    assert v.student(denoiser, "cd")[0] != first


# --- signs of mode seeking ----------------------------------------------------------------------


def test_signs_are_those_of_the_images_against_the_reference(toy: Params) -> None:
    v, dataset = validator(toy), ImageDataset(DATA)
    _, images, signs = v.student(load_model("teacher", toy)[0], "cd")
    real = dataset.read(real_images(dataset, 120))[0]
    spreads = [x.astype(np.float64).std(axis=0, ddof=1).mean() for x in (images, real)]
    features = v._features(20, lambda mine: images[mine])
    assert signs == {
        "recall": manifold(v.real_features, features, 3).recall,
        "brightness": pytest.approx(images.mean() / 255),
        "std_ratio": pytest.approx(spreads[0] / spreads[1]),
    }
    assert v.real_pixels.brightness == pytest.approx(real.mean() / 255)


def test_without_features_of_real_images_or_with_few_images_there_is_no_recall(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, stats = load_model("teacher", toy)[0], validator(toy).reference
    assert "recall" not in validator(toy, images=3).teacher(denoiser, Baseline("ddim", 2)).signs
    monkeypatch.setattr("fewstep.training.validation.published_reference", lambda *_: stats)
    metric = replace(toy.metric, reference=Download("stats.npz", "0" * 64))
    v = validator(replace(toy, metric=metric), reference_images=9999)
    assert set(v.student(denoiser, "cd").signs) == {"brightness", "std_ratio"}
    assert v.real_pixels.count == 200, "all that there are"


# --- what it leaves ----------------------------------------------------------------------------


def test_a_network_is_scored_in_eval_mode_and_left_in_its_own(toy: Params) -> None:
    v, (denoiser, _) = validator(toy, steps=1), load_model("teacher", toy)
    expected = v.student(denoiser, "cd")[0]
    for block in denoiser.modules():
        if isinstance(block, UNetBlock):
            block.dropout = 0.5
    seen: list[bool] = []
    denoiser.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    for training in (True, False):
        denoiser.train(training).requires_grad_(training)
        assert v.student(denoiser, "cd")[0] == expected, "no dropout"
        assert all(module.training == training for module in denoiser.modules())
        assert all(p.grad is None for p in denoiser.parameters())
    assert seen and not any(seen)


def test_kernels_of_a_network_are_compiled_before_its_first_score(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one process of each node first, as in a row; see tests/sampling/test_row.py."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "fewstep.training.validation.compile_once",
        lambda denoiser, params, row, count, rank: calls.append((row.model, count)),
    )
    denoiser, scores = load_model("teacher", toy)[0], validator(toy)
    for _ in range(2):
        scores.student(denoiser, "cd")
        scores.teacher(denoiser, Baseline("euler", 2))
    assert calls == [("cd", 8), ("teacher", 8)]


def test_scoring_draws_nothing_from_the_random_stream_of_training(toy: Params) -> None:
    v, (denoiser, _) = validator(toy, sampler="renoise"), load_model("teacher", toy)
    state = torch.get_rng_state()
    v.student(denoiser, "cd")
    assert torch.equal(torch.get_rng_state(), state)


# --- refusals ----------------------------------------------------------------------------------


def test_a_reference_larger_than_the_data_is_refused(toy: Params) -> None:
    match = r"need at most 200 reference images, .* got 201 \(params\.yaml: validation\.reference_i"
    denoiser, _ = load_model("teacher", toy)
    with pytest.raises(ValueError, match=match):
        validator(toy, reference_images=201).student(denoiser, "cd")


def test_a_training_without_validation_loads_no_feature_network(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        pytest.fail("nobody asked for a score")

    monkeypatch.setattr("fewstep.training.validation.feature_network", load)
    v = Validator(toy, None, EDM, ImageDataset(DATA), ALONE)
    with pytest.raises(AssertionError, match="without validation, nothing is scored"):
        v.student(load_model("teacher", toy)[0], "cd")


def test_images_that_are_not_finite_are_named_with_their_row(toy: Params) -> None:
    denoiser, _ = load_model("teacher", toy)
    with torch.no_grad():
        next(iter(denoiser.parameters())).fill_(float("nan"))
    match = "cd gave images that are not finite: ddim, 2 steps, guidance_scale 1.0, seeds 5 to 12"
    with pytest.raises(FloatingPointError, match=match):
        validator(toy).student(denoiser, "cd")


# --- images ------------------------------------------------------------------------------------


def test_reference_images_are_the_same_for_every_seed_and_begin_larger_ones(toy: Params) -> None:
    dataset = ImageDataset(DATA)
    few, many = real_images(dataset, 50), real_images(dataset, 200)
    assert np.array_equal(few, many[:50])
    assert sorted(many) == list(range(200)), "each image once"


# --- ranks -------------------------------------------------------------------------------------


def score_on_rank(index: int, world: int, folder: str) -> None:
    """One process of a group: score the teacher, and write what this rank found."""
    torch.set_num_threads(1)
    os.chdir(folder)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=world)
    params, rank = experiment(), Rank(index, world, torch.device("cpu"))
    v = Validator(params, replace(SETTINGS, images=21), EDM, ImageDataset(DATA), rank)
    value, images, signs = v.student(load_model("teacher", params)[0], "cd")
    real = {"mean": v.reference.mean, "total": v.real_pixels.total}
    np.savez(f"rank{index}.npz", value=value, images=images, signs=list(signs.values()), **real)
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that import torch
def test_two_ranks_give_the_score_of_one_bit_for_bit(
    toy: Params, tmp_path: Path, one_thread: None
) -> None:
    v = validator(toy, images=21)
    value, images, signs = v.student(load_model("teacher", toy)[0], "cd")
    spawn(score_on_rank, (2, str(tmp_path)), nprocs=2)
    for index in range(2):
        rank = np.load(f"rank{index}.npz")
        assert float(rank["value"]) == value
        np.testing.assert_array_equal(rank["images"], images)
        np.testing.assert_array_equal(rank["mean"], v.reference.mean)
        np.testing.assert_array_equal(rank["total"], v.real_pixels.total)
        assert rank["signs"].tolist() == list(signs.values())


STAGES = (ref_stats.run, partial(generate.run, name=ROW), partial(fid.run, name=ROW))


def stage_on_rank(index: int, world: int, stage: int, folder: str, port: int) -> None:
    """One process of a group, as torchrun starts it: a stage of the current experiment."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(RANK=str(index), WORLD_SIZE=str(world), LOCAL_RANK=str(index))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    STAGES[stage](load_params())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow  # two processes that import torch
def test_two_ranks_make_the_files_of_one(toy: Params, tmp_path: Path, one_thread: None) -> None:
    tiny_params(
        tmp_path,
        data__source="toy.npz",
        generate__images=21,
        generate__batch=4,
        generate__seed_ranges=2,
        metric__reference_images=120,
        metric__manifold={"k": 3, "density_k": 5},
    )
    files = ["ref-stats.npz", "ref-stats.json"]
    files += [f"{kind}/{ROW}.json" for kind in ("samples", "scores")]
    files += [f"samples/{ROW}.npz"]
    for stage in STAGES:
        stage(load_params())
    alone = [(Path("artifacts") / file).read_bytes() for file in files]
    for stage in range(3):
        spawn(stage_on_rank, (2, stage, str(tmp_path), free_port()), nprocs=2)
    assert [(Path("artifacts") / file).read_bytes() for file in files] == alone
