"""How fast this machine trains a network and scores images, measured in a few seconds."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fewstep.distributed import pick_device
from fewstep.metrics.features import extract_outputs
from fewstep.metrics.reference import feature_network
from fewstep.networks.compute import accelerate
from fewstep.networks.registry import build_denoiser
from fewstep.params import Params
from fewstep.planning.flops import forward_flops

BATCH = 32  # images of a step
TRIES = 3  # the fastest counts: other processes slow some of them down
LAUNCHING = 0.01  # seconds that a GPU's pass through a network takes at least: 1,000 launches
STAGE = 7.0  # seconds that a stage takes to start: Python, torch, the checks of DVC


@dataclass(frozen=True)
class Speed:
    """How fast images are trained on and scored.

    Attributes:
        flops: FLOP/s in training.
        scoring: seconds an image.
        busy: share of the time of measuring in which other processes had the processor.
        launching: seconds of a forward pass, whatever it computes.
    """

    flops: float
    scoring: float
    busy: float = 0.0
    launching: float = 0.0


def measure(params: Params) -> Speed:
    """The speed of this machine with the network and the metric of the params.

    A metric whose weights are not here yet costs no time to score: they may take long to fetch.
    """
    device, d = pick_device(params.device), params.data
    denoiser = accelerate(build_denoiser(params).to(device), params.performance)
    x = torch.randn(BATCH, d.channels, d.resolution, d.resolution, device=device)
    sigma = torch.ones(BATCH, device=device)
    labels = torch.zeros(BATCH, d.classes, device=device)

    def step() -> None:
        denoiser(x, sigma, labels).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    forward, _ = forward_flops(denoiser, params)
    seconds, busy = _fastest(step)
    flops = 3 * forward * BATCH / seconds  # a backward pass costs as much as two forward
    if params.metric.weights is not None:
        return Speed(flops, 0.0, busy)
    extractor = feature_network(params, device)
    images = np.zeros((extractor.chunk, d.channels, d.resolution, d.resolution), np.uint8)
    outputs, chunk = extractor.outputs, extractor.chunk
    seconds, _ = _fastest(lambda: extract_outputs(outputs, [images], chunk=chunk))
    return Speed(flops, seconds / len(images), busy)


def _fastest(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the fastest try, without those in which it waited for a processor.

    Returns:
        These seconds, and the share of all tries, after the first, that was waited.
    """
    call()  # compiles
    tries = []
    for _ in range(TRIES):
        before, computed, started = _waits(), time.process_time(), time.perf_counter()
        call()
        seconds, computed = time.perf_counter() - started, time.process_time() - computed
        waited = max((s - before.get(thread, 0.0) for thread, s in _waits().items()), default=0.0)
        # threads of this process wait for one another, too
        tries.append((seconds, max(min(waited, seconds - computed / _processors()), 0.0)))
    total, lost = (sum(parts) for parts in zip(*tries, strict=True))
    return min(seconds - waited for seconds, waited in tries), lost / total


def _processors() -> int:
    """How many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _waits() -> dict[str, float]:
    """Seconds that each thread of this process could have run and had no processor.

    Empty where the system does not say it, as on macOS.
    """
    waits = {}
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waits[thread.parent.name] = int(thread.read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):  # it has ended, or the system keeps no such count
            continue
    return waits
