"""What only a GPU can show of a whole training, and of processes that share it.

How networks are computed there is in networks/test_compute.py, that nothing waits for it in
training/test_quiet.py.
"""

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from experiment import set_up, tiny_params
from fewstep.distributed import Rank, over_ranks
from fewstep.networks.weights import read_safetensors
from fewstep.params import Params
from fewstep.paths import MODELS, SCRATCH
from fewstep.planning.preflight import dry_run
from fewstep.training import loop
from training.test_loop import Killed, kill_at

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda", 0)
SOON = timedelta(seconds=60)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the process's first product


@pytest.fixture
def in_order() -> Iterator[dict[str, Any]]:
    """The `performance` of trainings that give the same bits again; only of this test."""
    yield {"deterministic": True}
    torch.use_deterministic_algorithms(False)


def cuda_params(precision: str, **overrides: Any) -> Params:  # noqa: ANN401
    quiet = {"tracking__dvclive": False, "students__cd__validation": None}
    quiet |= {"data__source": "toy.npz", "device": "cuda", "precision": precision}
    return tiny_params(Path(), **quiet, students__cd__phema=None, **overrides)


def weights_of(name: str) -> dict[str, Tensor]:
    return read_safetensors(MODELS / name / "model.safetensors")[0]


@pytest.mark.parametrize("name", ["cd", "dmd2-1", "mm-2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_by_bit(
    name: str,
    precision: str,
    in_order: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_up(tmp_path, monkeypatch)
    params = cuda_params(precision, training__checkpoint_kimg=0.128, performance=in_order)
    rank = Rank(0, 1, GPU)
    loop.train(name, params, rank)
    whole = weights_of(name)
    shutil.rmtree(SCRATCH)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(192, patch)
        loop.train(name, params, rank)
    assert len(list(SCRATCH.rglob("state-000000000128.safetensors"))) == 1
    loop.train(name, params, rank)
    assert all(torch.equal(value, whole[key]) for key, value in weights_of(name).items())


@pytest.mark.parametrize("name", ["cd", "dmd2-4", "mm-2"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_step_is_finite_in_every_precision(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(tmp_path, monkeypatch)
    assert " GB" in dry_run(name, cuda_params(precision), Rank(0, 1, GPU))


# --- processes -----------------------------------------------------------------------------------


def _meet(rank: int, world: int, backend: str, folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.cuda.set_device(GPU)
    dist.init_process_group(backend, store, timeout=SOON, rank=rank, world_size=world)


def _sum(rank: int, world: int, backend: str, folder: Path) -> None:
    _meet(rank, world, backend, folder)
    values = torch.full((1000,), float(rank + 1), device=GPU)
    dist.all_reduce(values)
    assert set(values.tolist()) == {world * (world + 1) / 2}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, {"rank": rank})
    assert everyone == [{"rank": index} for index in range(world)]
    dist.destroy_process_group()


def test_nccl_sums_and_gathers_with_one_process(tmp_path: Path) -> None:
    spawn(_sum, (1, "nccl", tmp_path), nprocs=1)


def test_nccl_sums_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two processes on one GPU")
    spawn(_sum_on_two, (2, tmp_path), nprocs=2)


def _sum_on_two(rank: int, world: int, folder: Path) -> None:
    own = torch.device("cuda", rank)
    torch.cuda.set_device(own)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", store, timeout=SOON, rank=rank, world_size=world)
    values = torch.full((1000,), float(rank + 1), device=own)
    dist.all_reduce(values)
    assert set(values.tolist()) == {3.0}
    dist.destroy_process_group()


def test_gloo_sums_tensors_of_a_gpu_that_two_processes_share(tmp_path: Path) -> None:
    spawn(_sum, (2, "gloo", tmp_path), nprocs=2)


def _average(rank: int, world: int, folder: Path) -> None:
    _meet(rank, world, "gloo", folder)
    torch.manual_seed(0)
    network = nn.Linear(8, 8).to(GPU)
    shared = over_ranks(network, Rank(rank, world, GPU, rank))
    shared(torch.full((2, 8), float(rank + 1), device=GPU)).square().mean().backward()
    assert network.weight.grad is not None
    torch.save(network.weight.grad.cpu(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gradients_on_a_gpu_are_means_over_processes(tmp_path: Path) -> None:
    spawn(_average, (2, tmp_path), nprocs=2)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(mine, theirs)
    torch.manual_seed(0)
    network = nn.Linear(8, 8).to(GPU)
    losses = [network(torch.full((2, 8), float(r + 1), device=GPU)).square().mean() for r in (0, 1)]
    (sum(losses) / 2).backward()  # pyright: ignore
    assert network.weight.grad is not None
    torch.testing.assert_close(mine, network.weight.grad.cpu())
