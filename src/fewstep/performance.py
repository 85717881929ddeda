"""How networks are computed: layout, kernels, what is compiled or recomputed; `params.performance`.

Results agree up to rounding, so a training may go on under other choices than it began with; but
dropout draws its masks in the order of memory, so another layout draws others.
"""

import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewstep.params import Performance
from fewstep.unet import GroupNorm, UNet, UNetBlock, fused_attention, plain_attention

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ATTENTION = {"fused": fused_attention, "plain": plain_attention}
WARM_UP = 3  # calls before a CUDA graph is captured: libraries set themselves up in the first ones
KINDS_OF_BLOCKS = 256  # what one process may compile; ADM-64 has 30 kinds, times modes

Module = TypeVar("Module", bound=nn.Module)


def tune(network: Module, performance: Performance) -> Module:
    """The same network with layout, kernels and recomputed levels set; its weights do not change.

    Raises:
        ValueError: recomputed resolutions that no level has.
    """
    wanted = set(performance.recompute)
    for unet in (part for part in network.modules() if isinstance(part, UNet)):
        unet.layout = LAYOUTS[performance.layout]
        for norm in (part for part in unet.modules() if isinstance(part, GroupNorm)):
            norm.fused = performance.norm == "fused"
        named = [*unet.enc.items(), *unet.dec.items()]  # both have a "32x32_block0"
        stages = [(int(name.split("x")[0]), stage) for name, stage in named]
        if unknown := wanted - (levels := {level for level, _ in stages}):
            raise ValueError(
                f"need resolutions of {sorted(levels)} to recompute, got {sorted(unknown)} "
                "(params.yaml: performance.recompute)"
            )
        for level, stage in stages:
            if isinstance(stage, UNetBlock):
                stage.attention = ATTENTION[performance.attention]
                stage.recompute = level in wanted
    return network


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may multiply float32 in TF32, with 10 bits of fraction, in this process.

    torch's own setting lets convolutions do it, matrix products not.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def accelerate(network: Module, performance: Performance, frozen: bool = False) -> Module:
    """The same network, compiled and, where frozen, replayed as CUDA graphs, as params ask.

    To be called when the network is on its device. Shapes are static: each is compiled once.

    Raises:
        ValueError: a CPU without a C++ compiler is to compile.
    """
    kind = performance.compile
    if kind != "none":
        _check_compiler(network, kind)
        torch._dynamo.config.recompile_limit = KINDS_OF_BLOCKS  # pyright: ignore
        torch._inductor.config.fallback_random = True  # pyright: ignore  # dropout as without
    compiled: Any = {"none": (), "blocks": UNetBlock, "network": UNet}[kind]
    for part in network.modules():
        if isinstance(part, UNet) and frozen and performance.cuda_graphs:
            forward: Any = part.forward
            if kind == "network":
                forward = torch.compile(forward, dynamic=False)
            vars(part)["forward"] = Graphed(forward)
        elif isinstance(part, compiled):
            part.compile(dynamic=False)
    return network


def _check_compiler(network: nn.Module, kind: str) -> None:
    on_cpu = next(network.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ValueError(
            f"need a C++ compiler for compile: {kind} on a CPU, found none "
            "(params.yaml: performance.compile; try none)"
        )


class Graphed:
    """A function of CUDA tensors whose kernels are launched as one graph, one for each shape.

    The answer is a copy: the next call overwrites what the graph wrote. Calls that record a
    gradient, and those with tensors elsewhere, go to the function as they are.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not all(t.is_cuda for t in inputs):
            return self.function(*inputs)
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self.graphs:
            self.graphs[key] = self.capture(inputs)
        graph, places, answer = self.graphs[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return answer.clone()

    def capture(
        self, inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        """The graph, where its inputs go, and where its answer comes."""
        places = tuple(t.clone() for t in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        device = places[0].device  # its random stream goes on as if nothing had been tried
        with torch.random.fork_rng([device]), torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self.function(*places)
        return graph, places, answer
