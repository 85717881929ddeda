"""How networks are computed: layout, kernels, compilation, recomputation (params.performance).

All choices agree up to rounding, so a training may be resumed under other ones. One exception:
dropout draws its masks in the order of memory, so another layout draws others.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.denoiser import Denoiser
from fewstep.networks.layers import GroupNorm, cpu_kernels, fused_attention, plain_attention
from fewstep.params import Performance

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ATTENTION = {"fused": fused_attention, "plain": plain_attention}
WARM_UP = 3  # calls before a CUDA graph is captured; the first ones create handles and workspaces
KINDS_OF_BLOCKS = 512  # limit of torch.compile for a process; ADM-64 has 30 kinds in several modes

Captured = tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]
"""A graph, the tensors that it reads, and the one that it writes."""


def tune(denoiser: Denoiser, performance: Performance) -> Denoiser:
    """The same denoiser with layout, kernels and recomputed blocks set; no weight changes.

    Raises:
        ValueError: resolutions to recompute that no block has.
    """
    network, wanted = denoiser.model, set(performance.recompute)
    network.layout = LAYOUTS[performance.layout]
    for norm in (part for part in network.modules() if isinstance(part, GroupNorm)):
        norm.fused = performance.norm == "fused"
    if unknown := wanted - (known := {block.resolution for block in network.blocks()}):
        raise ValueError(
            f"need resolutions of {sorted(known)} to recompute, got {sorted(unknown)} "
            "(params.yaml: performance.recompute)"
        )
    for block in network.blocks():
        block.attention = ATTENTION[performance.attention]
        block.recompute = block.resolution in wanted
    return denoiser


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may multiply float32 in TF32, with 10 bits of fraction, in this process.

    By default PyTorch allows it in convolutions but not in matrix products.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def try_cudnns_kernels(wanted: bool) -> None:
    """Whether cuDNN times its kernels for each new shape, in this process; scores never do."""
    torch.backends.cudnn.benchmark = wanted


def add_in_order() -> None:
    """Let GPUs use only kernels that add in a fixed order, in this process, from now on.

    Call it before the first matrix product: cuBLAS reads its variable there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # filling new tensors would only find bugs, and takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


def accelerate(denoiser: Denoiser, performance: Performance, frozen: bool = False) -> Denoiser:
    """The same denoiser, compiled and, if frozen, replayed as CUDA graphs, as params ask.

    Call it once the denoiser is on its device. Every shape of the input is compiled separately.

    Raises:
        ValueError: there is no compiler, or none of Python's headers, for what is to be compiled.
    """
    network, kind = denoiser.model, performance.compile
    device = next(network.parameters()).device.type
    if device == "meta":  # of a plan, which counts and computes nothing
        return denoiser
    on_cpu = device == "cpu"
    if on_cpu and performance.norm == "fused" and performance.layout == "channels_last":
        _say_if_without_numba()
    if kind != "none":
        _prepare_compiler(kind, on_cpu)
    if kind == "blocks":
        for block in network.blocks():
            block.compile(dynamic=False)
    if frozen and performance.cuda_graphs:
        forward: Any = network.forward
        if kind == "network":
            forward = torch.compile(forward, dynamic=False)
        vars(network)["forward"] = Graphed(forward, network)
    elif kind == "network":
        network.compile(dynamic=False)
    return denoiser


@cache
def _say_if_without_numba() -> None:
    """One line a process, since a training without our kernels is correct but slower."""
    if cpu_kernels() is None:
        print(
            "performance.norm: fused needs numba on a CPU; PyTorch's slower norms are used "
            "(pip install 'fewstep[cpu]')",
            file=sys.stderr,
        )


def _prepare_compiler(kind: str, on_cpu: bool) -> None:
    """Set up torch.compile, after a look for what it would only miss minutes later."""
    if missing := missing_for_compiling(on_cpu):
        raise ValueError(
            f"need {missing} for compile: {kind} on a {'CPU' if on_cpu else 'GPU'}, found none "
            "(params.yaml: performance.compile; try none)"
        )
    # past either limit torch.compile goes on without compiling, and says so only in a log
    torch._dynamo.config.recompile_limit = KINDS_OF_BLOCKS  # pyright: ignore
    torch._dynamo.config.accumulated_recompile_limit = KINDS_OF_BLOCKS  # pyright: ignore
    # draw dropout masks from PyTorch's generator, so that compiling changes none of them
    torch._inductor.config.fallback_random = True  # pyright: ignore
    if kind == "blocks":
        # A block's gradients are ready when its backward pass ends, so DistributedDataParallel
        # overlaps without help. With that help a block is another program than on one GPU, and
        # one that is computed again in the backward pass is refused.
        torch._dynamo.config.optimize_ddp = False  # pyright: ignore


def missing_for_compiling(on_cpu: bool) -> str | None:
    """Of a CPU a C++ compiler; of a GPU what Triton builds its launchers with."""
    if on_cpu:
        return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "a C++ compiler"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "a C compiler"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return None if headers.is_file() else f"Python's headers, {headers},"


class Graphed:
    """A function of CUDA tensors that launches its kernels as one CUDA graph.

    A graph replays exactly what was recorded, so there is one for each shape of the input and for
    each mode of `module`, whose code the function is: train mode drops labels and activations. The
    result is a copy, because the next replay overwrites the graph's own. Calls that record a
    gradient and those with tensors elsewhere go straight to the function.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        self.function, self.module = function, module
        self.graphs: dict[Any, Captured] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not all(t.is_cuda for t in inputs):
            return self.function(*inputs)
        if (key := self.key(inputs)) not in self.graphs:
            self.graphs[key] = self.capture(inputs)
        graph, places, answer = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return answer.clone()

    def key(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Mode and shapes: what a graph cannot change once it is captured."""
        return self.module.training, *((t.shape, t.dtype) for t in inputs)

    def capture(self, inputs: tuple[Tensor, ...]) -> Captured:
        """Record the kernels that the function launches for such inputs."""
        places = tuple(t.clone() for t in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        # warming up must not advance the random stream: a resumed run captures again, and would
        # draw other masks than the uninterrupted one
        with torch.random.fork_rng([places[0].device]), torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # by default a capture fails when any thread of the process allocates, as the one does that
        # reads ahead and pins its batches
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            answer = self.function(*places)
        return graph, places, answer
