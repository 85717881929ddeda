"""Training steps and samplers let the CPU run ahead of a GPU, for which `meta` stands here.

Nobody can look at values on that device, and copies to it have to be ones that need no waiting.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import EDM
from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.method import student_block
from fewstep.networks.weights import load_model
from fewstep.params import Params, Row
from fewstep.paths import DATA
from fewstep.sampling import batches as drawing
from fewstep.theory.guidance import guided
from fewstep.theory.sample import SAMPLERS, SeededNoise, sample
from fewstep.training.loop import Run

META = torch.device("meta")
CHURN = {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.0}


class NoWaiting(TorchDispatchMode):
    """Refuses copies from the CPU to the device that would wait until the device is idle."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        came = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            place, source, *asynchronous = args
            assert place.device == source.device or asynchronous == [True], "a copy that waits"
        elif func is torch.ops.aten._to_copy.default:
            asynchronous = (kwargs or {}).get("non_blocking")
            assert args[0].device == came.device or asynchronous, "a copy that waits"
        return came


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """An experiment where torch takes meta for a GPU."""

    class OnCpu(torch.Generator):
        def __new__(cls, device: object = "cpu") -> "OnCpu":
            return super().__new__(cls, "cpu")  # pyright: ignore

    monkeypatch.setattr(torch, "Generator", OnCpu)
    optimizers = sys.modules[torch.optim.Optimizer.__module__]  # whose name torch.optim deletes
    for module, kind in ((_foreach_utils, "foreach"), (optimizers, "fused")):
        name = f"_get_{kind}_kernels_supported_devices"
        monkeypatch.setattr(module, name, lambda: ["meta"])
    return set_up(tmp_path, monkeypatch)


METHODS = pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("teacher", {}),
        ("cd", {}),
        ("dmd2-1", {}),
        ("dmd2-4", {"separate_labels": True}),
        ("dmd2-4", {"all_stops": True}),
        ("mm-2", {}),
    ],
)


def quiet_run(name: str, settings: dict[str, Any], precision: str, device: torch.device) -> Run:
    """A training so long that none of its first steps writes a row, a state or a score."""
    block = "teacher__train" if name == "teacher" else f"students__{name.replace('-', '_')}"
    changes = {"kimg": 100.0, "checkpoint_kimg": 100.0, "validation": None, "phema": None}
    changes |= {f"settings__{key}": value for key, value in settings.items()}
    if name == "dmd2-4":
        changes["init_from"] = "teacher"
    params = tiny_params(
        Path(),
        data__source="toy.npz",
        precision=precision,
        **{f"{block}__{key}": value for key, value in changes.items()},
    )
    rank = Rank(0, 1, device)
    return Run(name, student_block(name, params), params, rank, ImageDataset(DATA, 10))


@METHODS
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_quiet_training_step_never_waits_for_the_device(
    name: str, settings: dict[str, Any], precision: str, toy: Params
) -> None:
    run = quiet_run(name, settings, precision, META)
    with NoWaiting():
        for _ in range(2):
            run.iterate()
    assert next(run.method.student.parameters()).is_meta


@pytest.mark.cuda
@METHODS
def test_on_a_gpu_nothing_that_waits_is_called_either(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(tmp_path, monkeypatch)
    run = quiet_run(name, settings, "bf16", torch.device("cuda", 0))
    run.iterate()  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            run.iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_never_waits_for_the_device(sampler: str, scale: float, toy: Params) -> None:
    denoise = guided(load_model("teacher", toy)[0].to(META), scale)
    noise, churn = SeededNoise(range(3), (1, 16, 16), META), CHURN if sampler == "churn" else None
    labels = torch.empty(3, 10, device=META)
    with NoWaiting(), torch.no_grad():
        x = sample(sampler, denoise, noise, noise(), labels, EDM.nodes(4), churn)
    assert x.shape == (3, 1, 16, 16)


def test_a_device_has_the_next_batch_before_the_images_of_one_are_waited_for(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list[str]()

    def launched(sampler: str, denoise: object, noise: SeededNoise, *rest: object) -> object:
        order.append(f"launched {len(noise.generators)}")
        return noise()

    def finished(row: Row, seeds: range, *rest: object) -> range:
        order.append(f"finished {len(seeds)}")
        return seeds

    monkeypatch.setattr(drawing, "sample", launched)
    monkeypatch.setattr(drawing, "_finished", finished)
    denoiser, parts = load_model("teacher", toy)[0].to(META), [range(3), range(3, 5), range(5, 6)]
    row = Row("teacher", "euler", 1, 1.0)
    with NoWaiting():
        made = list(drawing.generate_batches(toy, row, denoiser, EDM, parts, META))
    assert made == parts
    steps = ("launched 3", "launched 2", "finished 3", "launched 1", "finished 2", "finished 1")
    assert tuple(order) == steps
