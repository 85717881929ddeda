"""Training EDM2's network by every method: forced weights, exact resume, ranks, half precision."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.method import student_block
from fewstep.networks.edm2 import EDM2
from fewstep.networks.magnitude import MPConv
from fewstep.networks.protocol import networks_in
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import read_safetensors, save_model
from fewstep.params import Params
from fewstep.paths import DATA, MODELS
from fewstep.training import loop
from fewstep.training.finished import forget_finished
from fewstep.training.loop import Run

ALONE = Rank(0, 1, torch.device("cpu"))
NAMES = ("teacher", "cd", "dmd2-1", "dmd2-4", "mm-2")
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:need 113 images")


class Killed(Exception):
    """Stands for the death of the process between two iterations."""


def params_of(**overrides: Any) -> Params:  # noqa: ANN401
    quiet = {
        "data__source": "toy.npz",
        "network__type": "edm2",
        "tracking__dvclive": False,
        "teacher__train__kimg": 0.16,
        "teacher__train__checkpoint_kimg": 0.064,
        "students__cd__phema": None,
        "students__cd__validation": None,
        "students__dmd2_4__init_from": "teacher",
    }
    for name in ("cd", "dmd2-1", "dmd2-4", "mm-2"):
        quiet[f"students__{name}__kimg"] = 0.16
        quiet[f"students__{name}__checkpoint_kimg"] = 0.064
    return tiny_params(Path(), **{**quiet, **overrides})


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A teacher whose weights have other magnitudes than 1, as an average that was imported."""
    set_up(tmp_path, monkeypatch)
    params = params_of()
    torch.manual_seed(0)
    teacher = build_denoiser(params)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).mul_(1.5)
    save_model(MODELS / "teacher", teacher.state_dict(), {"name": "teacher", "kimg": 0.0})
    return params


def run_of(name: str, params: Params) -> Run:
    return Run(name, student_block(name, params), params, ALONE, ImageDataset(DATA, 10))


def magnitudes(module: torch.nn.Module) -> list[float]:
    """Of the weights of each output of each layer: how far they are from 1."""
    layers = [part.weight.detach() for part in module.modules() if isinstance(part, MPConv)]
    assert layers
    return [float((w.flatten(1).square().mean(dim=1).sqrt() - 1).abs().max()) for w in layers]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("teacher", "fp32"), ("cd", "bf16"), ("dmd2-4", "fp16")),
        *(pytest.param("dmd2-1", "fp32", marks=SLOW), pytest.param("mm-2", "bf16", marks=SLOW)),
    ],
)
def test_weights_have_magnitude_1_before_and_after_each_step(
    name: str, precision: str, toy: Params
) -> None:
    run = run_of(name, params_of(precision=precision))
    for _ in range(3):
        for module in run.method.trained.values():
            assert max(magnitudes(module)) < 2e-3
        run.iterate()
    # in fp16 the loss may begin at too large a scale, which each overflow halves
    assert run.nonfinite.total == 0 or precision == "fp16"
    before = run.method.trained.values()
    moved = [p for module in before for p in module.parameters() if p.requires_grad]
    assert moved and all(bool(p.isfinite().all()) for p in moved)
    if teacher := run.method.frozen.get("teacher"):
        state = read_safetensors(MODELS / "teacher" / "model.safetensors")[0]
        assert all(torch.equal(w, state[n]) for n, w in teacher.state_dict().items())


@pytest.mark.parametrize(
    "name", ["teacher", "cd", *(pytest.param(n, marks=SLOW) for n in NAMES[2:])]
)
def test_the_uncertainty_is_trained_by_denoising_alone(name: str, toy: Params) -> None:
    run = run_of(name, toy)
    heads = [n.logvar for m in run.method.trained.values() for n in networks_in(m)]
    before = [{k: v.clone() for k, v in head.state_dict().items()} for head in heads if head]
    assert len(before) == len(heads) > 0
    for _ in range(2):
        run.iterate()
    for old, head in zip(before, heads, strict=True):
        assert head is not None
        new = head.state_dict()
        change = float((new["linear.weight"] - old["linear.weight"]).norm())
        assert torch.equal(new["fourier.freqs"], old["fourier.freqs"])
        assert (change > 1e-3) == (name == "teacher")
    phase, *_ = run.method.phases(0, 0.0)
    run.update(phase, run.feed(run.nimg), [])  # whose values no row has taken yet
    assert ("loss_uncertainty" in run.meter.means()) == (name == "teacher")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("teacher", "fp32"),
        ("dmd2-4", "bf16"),
        *(pytest.param(n, "fp16", marks=SLOW) for n in NAMES),
    ],
)
def test_resumed_equals_uninterrupted(
    name: str, precision: str, toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    phema = {"stds": [0.05, 0.1], "snapshot_kimg": 0.064}
    key = "teacher__train" if name == "teacher" else f"students__{name}"
    params = params_of(precision=precision, **{f"{key}__phema": phema})
    loop.train(name, params, ALONE)
    whole = (MODELS / name / "model.safetensors").read_bytes()
    forget_finished(name)
    iterate = Run.iterate

    def dying(run: Run) -> None:
        if run.nimg >= 96:
            run.checkpoints.wait()
            raise Killed
        iterate(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "iterate", dying)
        with pytest.raises(Killed):
            loop.train(name, params, ALONE)
    loop.train(name, params, ALONE)
    assert (MODELS / name / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("updates", ["foreach", pytest.param("loop", marks=SLOW)])
def test_every_way_to_update_gives_the_same_weights(updates: str, toy: Params) -> None:
    weights = []
    for how in ("fused", updates):
        run = run_of("cd", params_of(performance={"updates": how}))
        for _ in range(3):
            run.iterate()
        weights.append(run.averages.networks["average"].state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_an_average_of_forced_weights_is_used_at_magnitude_1(toy: Params) -> None:
    run = run_of("cd", toy)
    for _ in range(4):
        run.iterate()
    average = run.averages.networks["average"]
    assert isinstance(average.model, EDM2)
    x, sigma, labels = torch.randn(2, 1, 16, 16), torch.ones(2), torch.eye(10)[:2]
    answer = average(x, sigma, labels)
    average.model.after_step()
    torch.testing.assert_close(average(x, sigma, labels), answer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) for n in ("teacher", "cd", "dmd2-4")])
def test_two_ranks_equal_one(name: str, toy: Params) -> None:
    key = "teacher__train" if name == "teacher" else f"students__{name}"
    params_of(**{f"{key}__batch_gpu": 8})
    found = []
    for ranks in (1, 2):
        forget_finished(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", "-m", "fewstep", "train", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(read_safetensors(MODELS / name / "model.safetensors")[0])
    for key, value in found[0].items():
        error = (found[1][key] - value).norm() / value.norm().clamp(min=1e-3)
        assert error <= 1e-4, f"{key}: {error:.2e}"
