"""Processes and devices: joining the process group, and the few collectives of training."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.gpus import count_gpus, driver_version
from fewstep.network_card import name_network_card

BUCKET_MB = 100  # of gradients per all-reduce: fewer, larger messages than the default 25 MB


@dataclass(frozen=True)
class Rank:
    """This process: its number, the number of processes, its device, its number on its node."""

    index: int
    world: int
    device: torch.device
    local: int = 0

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def node(self) -> int:
        """Number of the first process on the same node; torchrun numbers node by node."""
        return self.index - self.local


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of params.yaml; `auto` is CUDA if there is a GPU, otherwise the CPU.

    Raises:
        ValueError: CUDA is requested and there is no GPU, or there are some that CUDA cannot use.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    if gpus := count_gpus():  # a training that took the CPU instead would last for months
        raise ValueError(
            f"need a CUDA that can use the {gpus} GPUs here, got driver {driver_version()} and "
            f"torch {torch.__version__}: {_why_no_cuda()} (params.yaml: device; cpu does without; "
            "nvidia-smi shows what the driver supports, pytorch.org the wheels for it)"
        )
    if name == "cuda":
        raise ValueError("need a GPU for device: cuda, found none (params.yaml: device; try auto)")
    return torch.device("cpu")


def _why_no_cuda() -> str:
    """What CUDA says of itself, without the advice that follows."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].strip()
    return "CUDA finds none of them"


@contextmanager
def joined(device: str) -> Generator[Rank]:
    """Join the process group that torchrun describes; without torchrun, this is the only rank.

    An error leaves the group as it is: taking it down could wait for ranks that wait for this one.
    """
    environ = os.environ if "LOCAL_RANK" in os.environ else {}  # without it, RANK may count nodes
    index, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    local = int(environ.get("LOCAL_RANK", 0))
    place = pick_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        name_network_card()
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Rank(index, world, place, local)
    except SystemExit:  # all ranks have agreed to stop
        _leave(world)
        raise
    _leave(world)


def _leave(world: int) -> None:
    if world > 1:
        dist.destroy_process_group()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on that device, without waiting for a busy GPU."""
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()  # a copy from pageable memory would block
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy values from the device; what is returned waits for them, and only for them.

    `values.cpu()` would also wait for all that was launched since they were computed.
    """
    if not values.is_cuda:
        return lambda: values
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return there.clone()  # page-locked memory is scarce, and goes to the next copy

    return wait


def over_ranks(module: nn.Module, rank: Rank) -> nn.Module:
    """The module, with its gradients averaged over ranks during the backward pass."""
    if rank.world == 1:
        return module
    averaged = DistributedDataParallel(
        module,
        device_ids=[rank.device] if rank.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=BUCKET_MB,
    )
    # The buffers are constants. Set here, because the argument's name changed in torch.
    averaged.broadcast_buffers = False
    return averaged


def sum_over_ranks(values: Tensor, rank: Rank) -> Tensor:
    """Elementwise sum, in place, on every rank."""
    if rank.world > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any, rank: Rank) -> list[Any]:  # noqa: ANN401
    """The value of each rank, in order, on every rank; anything that can be pickled."""
    values = [value] * rank.world
    if rank.world > 1:
        dist.all_gather_object(values, value)
    return values


class AnyRank:
    """Whether some rank raised its flag, one call late, so that no rank waits for another's step.

    The flags travel between CPUs (gloo), so no GPU waits either.
    """

    def __init__(self, rank: Rank) -> None:
        self.group = dist.new_group(backend="gloo") if rank.world > 1 else None
        self.flag, self.pending = torch.zeros(1), None

    def __call__(self, flag: bool) -> bool:
        """Raise the flag or not; all ranks must call this equally often and get the same answer."""
        if self.group is None:
            return flag
        if self.pending is not None:
            self.pending.wait()
        raised = bool(self.flag)
        self.flag = torch.tensor([float(flag)])
        self.pending = dist.all_reduce(self.flag, group=self.group, async_op=True)
        return raised


def barrier(rank: Rank) -> None:
    if rank.world > 1:
        dist.barrier()


@contextmanager
def one_of_node_first(rank: Rank) -> Generator[None]:
    """Work that one process of each node does before the others, which find what it compiled.

    All ranks must come here, and the work must hold no collective.
    """
    if rank.local:
        barrier(rank)
    yield
    if not rank.local:
        barrier(rank)
