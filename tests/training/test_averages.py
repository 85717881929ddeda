"""The averages are what their formulas say; snapshots give back, and nearly give, any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import Gaussian, small_denoiser
from experiment import set_up, tiny_params
from fewstep.files import write_json
from fewstep.networks.weights import load_model, read_safetensors, save_weights
from fewstep.params import Ema, Phema, Student
from fewstep.paths import MODELS, SNAPSHOTS
from fewstep.stages import phema
from fewstep.theory.ema import power_beta, std_to_exponent
from fewstep.training.averages import Averages, reconstruct

BATCH, ITERATIONS, EVERY = 100, 400, 20
STDS = (0.05, 0.1)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Batches of 100, profiles of width 0.05 and 0.1."""
    cd = tiny_params(tmp_path_factory.mktemp("params")).students["cd"]
    return replace(cd, batch=BATCH, phema=Phema(STDS, EVERY * BATCH / 1000))


def script() -> np.ndarray:
    """One weight's value after each iteration: a decay to a new place, and a random walk."""
    walk = np.random.default_rng(0).normal(size=ITERATIONS).cumsum()
    return 3 * np.exp(-np.arange(1, ITERATIONS + 1) / 80) + 0.05 * walk


def play(averages: Averages, folder: Path | None = None) -> dict[str, list[float]]:
    """Each average after each iteration of the script, with snapshots in the folder."""
    student = averages.student
    assert isinstance(student, Gaussian)
    found: dict[str, list[float]] = {name: [] for name in averages.networks}
    for i, value in enumerate(script()):
        student.gain.data.fill_(value)
        averages.update(i * BATCH)
        if folder is not None and (i + 1) % EVERY == 0:
            averages.snapshot(folder, (i + 1) * BATCH)
        for name, network in averages.networks.items():
            found[name].append(float(network.state_dict()["gain"]))
    return found


def weighted(shares: np.ndarray) -> float:
    """The script's mean under unnormalised shares (iterations,)."""
    return float(shares @ script()[: len(shares)] / shares.sum())


def power_average(std: float, iterations: int) -> float:
    """The running power-function average of the script, in float64."""
    total = 0.0
    for i, value in enumerate(script()[:iterations]):
        beta = power_beta(BATCH, (i + 1) * BATCH, std)
        total = beta * total + (1 - beta) * value
    return total


# --- averages ----------------------------------------------------------------------------------


def test_half_life_average_weighs_each_iteration_by_its_age(block: Student) -> None:
    ema = Ema("half_life", kimg=2.0, rampup=0.0)
    found = play(Averages(Gaussian(), replace(block, ema=ema)))["average"]
    age = np.arange(ITERATIONS)[::-1] * BATCH
    shares = 0.5 ** (age / 2000) * (1 - 0.5 ** (BATCH / 2000))
    expected = shares @ script() + 0.5 ** (ITERATIONS * BATCH / 2000)  # the gain began at 1
    assert found[-1] == pytest.approx(expected, rel=1e-5)


def test_half_life_with_a_ramp_forgets_the_first_weights(block: Student) -> None:
    ema = Ema("half_life", kimg=2.0, rampup=0.05)
    found = play(Averages(Gaussian(), replace(block, ema=ema)))["average"]
    total = 1.0
    for i, value in enumerate(script()):
        half_life = min(2000, 0.05 * i * BATCH)
        beta = 0.5 ** (BATCH / half_life) if half_life else 0.0
        total = beta * total + (1 - beta) * value
        assert found[i] == pytest.approx(total, rel=1e-5)
    assert found[0] == pytest.approx(script()[0], rel=1e-6)


def test_power_average_weighs_each_time_by_its_power(block: Student) -> None:
    """EDM2, eq. 127: the share of time t is t^gamma, whatever the batch."""
    averages = Averages(Gaussian(), replace(block, ema=Ema("power", std=0.1)))
    found = play(averages)["average"]
    t = np.arange(ITERATIONS + 1) / ITERATIONS
    shares = np.diff(t ** (std_to_exponent(0.1) + 1))
    assert found[-1] == pytest.approx(weighted(shares), rel=1e-5)


def test_no_average_is_the_student(block: Student) -> None:
    found = play(Averages(Gaussian(), replace(block, ema=Ema("none"))))["average"]
    np.testing.assert_allclose(found, script(), rtol=1e-6)


def test_profiles_are_tracked_beside_the_saved_average(block: Student) -> None:
    averages = Averages(Gaussian(), block)
    assert list(averages.networks) == ["average", "phema_0.05", "phema_0.1"]
    found = play(averages)
    for std in STDS:
        for iterations in (1, 7, ITERATIONS):
            expected = power_average(std, iterations)
            assert found[f"phema_{std}"][iterations - 1] == pytest.approx(expected, rel=1e-5)


def test_averages_are_frozen_copies_in_eval_mode(block: Student) -> None:
    student = small_denoiser(0, dropout=0.5).train()
    averages = Averages(student, block)
    assert student.training and all(p.requires_grad for p in student.parameters())
    for network in averages.networks.values():
        assert not any(m.training for m in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
        pairs = zip(network.parameters(), student.parameters(), strict=True)
        assert all(mine is not other and torch.equal(mine, other) for mine, other in pairs)


def test_a_student_without_profiles_keeps_one_average_and_no_snapshots(
    block: Student, tmp_path: Path
) -> None:
    averages = Averages(Gaussian(), replace(block, phema=None))
    averages.snapshot(tmp_path / "snapshots", BATCH)
    assert list(averages.networks) == ["average"] and not (tmp_path / "snapshots").exists()


# --- reconstruction ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(block: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    play(Averages(Gaussian(), block), folder)
    assert len(list(folder.iterdir())) == len(STDS) * ITERATIONS // EVERY
    return folder


@pytest.fixture
def snapshots(played: Path, tmp_path: Path) -> Path:
    """The snapshots of the script, to be spoilt at will."""
    return shutil.copytree(played, tmp_path / "snapshots")


def gain(folder: Path, std: float, kimg: float | None) -> float:
    return float(reconstruct(folder, std, kimg)[0]["gain"])


def test_a_tracked_profile_comes_back_exactly(snapshots: Path) -> None:
    for nimg in (EVERY * BATCH, 7 * EVERY * BATCH, ITERATIONS * BATCH):
        for std in STDS:
            stored, _ = read_safetensors(snapshots / f"phema-{nimg:012d}-{std}.safetensors")
            assert gain(snapshots, std, nimg / 1000) == pytest.approx(float(stored["gain"]), 1e-6)


@pytest.mark.parametrize("kimg", [20.0, 40.0])
@pytest.mark.parametrize(
    ("std", "error"),
    [(0.04, 2e-3), (0.06, 5e-4), (0.075, 5e-4), (0.12, 1e-3), (0.15, 5e-3), (0.2, 0.03)],
)
def test_other_profiles_are_near_what_tracking_them_would_have_given(
    std: float, error: float, kimg: float, snapshots: Path
) -> None:
    """Between the two widths within 1.5e-4 of the weight; outside them, worse with distance."""
    iterations = round(kimg * 1000) // BATCH
    expected = power_average(std, iterations)
    assert gain(snapshots, std, kimg) == pytest.approx(expected, rel=error)


def test_the_last_snapshot_is_the_time_when_none_is_named(snapshots: Path) -> None:
    last = ITERATIONS * BATCH / 1000
    weights, about = reconstruct(snapshots, 0.07, None)
    assert about["kimg"] == last and about["std"] == 0.07
    assert weights["gain"].dtype == torch.float32
    assert float(weights["gain"]) == gain(snapshots, 0.07, last)
    assert sum(about["snapshots"].values()) == pytest.approx(1)
    assert set(about["snapshots"]) == {file.name for file in snapshots.iterdir()}
    json.dumps(about, allow_nan=False)


def test_later_snapshots_have_no_part_in_an_earlier_average(snapshots: Path) -> None:
    before = gain(snapshots, 0.07, 20.0)
    for file in snapshots.iterdir():
        if int(file.name.split("-")[1]) > 20_000:
            file.unlink()
    assert gain(snapshots, 0.07, 20.0) == before == gain(snapshots, 0.07, None)


def test_a_time_between_snapshots_is_near_too(snapshots: Path) -> None:
    """The one before it alone, which cannot know what followed, would be 4.5 % off."""
    expected = power_average(0.07, 390)
    assert gain(snapshots, 0.07, 39.0) == pytest.approx(expected, rel=0.005)
    assert abs(gain(snapshots, 0.07, 38.0) / expected - 1) > 0.04


def test_many_snapshots_still_solve(tmp_path: Path) -> None:
    """Neighbours of a long run are nearly the same profile: the system must not blow up."""
    generator = torch.Generator().manual_seed(0)
    weight, averaged = torch.zeros(()), dict.fromkeys(STDS, torch.zeros(()))
    tracked = torch.zeros((), dtype=torch.float64)
    for i in range(1, 2001):
        weight = weight + 0.05 * torch.randn((), generator=generator)
        tracked = mixed(tracked, weight, i, 0.07)
        averaged = {std: mixed(a, weight, i, std) for std, a in averaged.items()}
        if i % 20 == 0:
            for std, average in averaged.items():
                file = tmp_path / f"phema-{i * BATCH:012d}-{std}.safetensors"
                save_file({"gain": average}, file)
    weights, about = reconstruct(tmp_path, 0.07, None)
    assert float(weights["gain"]) == pytest.approx(float(tracked), rel=0.01)
    assert max(map(abs, about["snapshots"].values())) < 10


def mixed(average: Tensor, weight: Tensor, i: int, std: float) -> Tensor:
    beta = power_beta(BATCH, i * BATCH, std)
    return beta * average + (1 - beta) * weight


# --- refusals ----------------------------------------------------------------------------------


def test_no_snapshots_are_said_with_the_key_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"need snapshots .* in \S+gone, found none.*phema: {"):
        reconstruct(tmp_path / "gone", 0.1, None)
    save_weights(tmp_path / "best.safetensors", {"gain": torch.ones(())}, {})
    with pytest.raises(ValueError, match="found none"):
        reconstruct(tmp_path, 0.1, None)


@pytest.mark.parametrize("kimg", [0.0, 1.9, 40.1, -1.0])
def test_a_time_outside_the_snapshots_is_refused(kimg: float, snapshots: Path) -> None:
    with pytest.raises(ValueError, match=rf"need kimg from 2.0 to 40.0, .* got {kimg} \(--kimg\)"):
        reconstruct(snapshots, 0.1, kimg)


@pytest.mark.parametrize("std", [0.0, 0.3, -0.1])
def test_a_width_that_no_profile_has_is_refused(std: float, snapshots: Path) -> None:
    with pytest.raises(ValueError, match=rf"need 0 < std < 0.289, got {std}"):
        reconstruct(snapshots, std, None)


def test_a_snapshot_that_was_cut_is_named(snapshots: Path) -> None:
    file = sorted(snapshots.iterdir())[3]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"need a safetensors file at .*{file.name}"):
        reconstruct(snapshots, 0.07, None)


# --- the stage ---------------------------------------------------------------------------------


def test_the_stage_writes_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = set_up(tmp_path, monkeypatch, images=8)
    student, _ = load_model("teacher", params)
    averages = Averages(student, replace(params.students["cd"], phema=Phema(STDS, 0.032)))
    for nimg in (32, 64):
        for parameter in student.parameters():
            parameter.data.add_(0.1)
        averages.update(nimg - 32)
        averages.snapshot(SNAPSHOTS / "cd", nimg)
    write_json(MODELS / "cd" / "model.json", {"sampling": {"sampler": "ddim", "steps": 4}})
    phema.run(params, "cd", 0.07, None, None)
    denoiser, about = load_model("cd-phema-0.07-0.064", params)
    assert about["name"] == "cd-phema-0.07-0.064" and about["student"] == "cd"
    assert about["sampling"] == {"sampler": "ddim", "steps": 4}, "as its student"
    assert (about["std"], about["kimg"], len(about["snapshots"])) == (0.07, 0.064, 4)
    bias = float(dict(denoiser.named_parameters())["model.out_conv.bias"][0])
    of_student = float(dict(student.named_parameters())["model.out_conv.bias"][0])
    assert of_student - 0.1 < bias < of_student
    assert "std 0.07" in capsys.readouterr().out
    phema.run(params, "cd", 0.1, 0.032, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert [p.name for p in MODELS.iterdir() if "phema" in p.name] == ["cd-phema-0.07-0.064"]


def test_the_stage_refuses_snapshots_of_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = set_up(tmp_path, monkeypatch, images=8)
    save_weights(SNAPSHOTS / "cd" / "phema-000000000032-0.1.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="does not fit the network"):
        phema.run(params, "cd", 0.1, None, None)
    assert not (MODELS / "cd-phema-0.1-0.032").exists()
