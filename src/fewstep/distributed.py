"""Processes and devices: the launch under torchrun, and the few collectives that training needs."""

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """This process among all: its number, how many there are, and its device."""

    index: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.index == 0


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("need a GPU for device: cuda, found none (params.yaml: device; try auto)")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def launched() -> bool:
    """Whether torchrun (or srun with torchrun's variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(device: str) -> NoReturn:
    """Run this command line again under torchrun, one process a GPU, and exit as it does.

    A CPU gets one process with all its cores: two with half of them are no faster.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # what went wrong is said by the process that it went wrong in
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    kind = pick_device(device).type
    count = torch.cuda.device_count() if kind == "cuda" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # torchrun would say 1
    print(f"torchrun: {count} x {kind}", flush=True)
    here = ["--standalone", f"--nproc-per-node={count}", "-m", "fewstep", *sys.argv[1:]]
    try:
        run.main(here)
    except ChildFailedError as error:
        sys.exit(next(iter(error.failures.values())).exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def start(device: str) -> Rank:
    """Join the process group that torchrun describes; alone, there is none to join."""
    index, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Rank(index, world, place)


def average_gradients(parameters: Iterable[Tensor], rank: Rank) -> None:
    """Replace each gradient by its mean over ranks, in one flat all-reduce."""
    if rank.world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= rank.world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def any_rank(flag: bool, rank: Rank) -> bool:
    """Whether any rank raised the flag; every rank gets the same answer."""
    if rank.world == 1:
        return flag
    value = torch.tensor([float(flag)], device=rank.device)
    dist.all_reduce(value)
    return bool(value.item())


def barrier(rank: Rank) -> None:
    if rank.world > 1:
        dist.barrier()


def stop(rank: Rank) -> None:
    if rank.world > 1:
        dist.destroy_process_group()
