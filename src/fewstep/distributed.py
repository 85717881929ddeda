"""Processes and devices: joining torchrun's group, and the few collectives that training needs."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

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
