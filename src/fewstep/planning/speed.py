"""How fast this machine trains a network and scores images, measured in a few seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

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
STAGE = 7.0  # seconds that a stage takes to start: Python, torch, the checks of DVC


@dataclass(frozen=True)
class Speed:
    """FLOP/s in training, and seconds to score an image."""

    flops: float
    scoring: float


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
    flops = 3 * forward * BATCH / _fastest(step)  # a backward pass costs as much as two forward
    if params.metric.weights is not None:
        return Speed(flops, 0.0)
    extractor = feature_network(params, device)
    images = np.zeros((extractor.chunk, d.channels, d.resolution, d.resolution), np.uint8)
    seconds = _fastest(lambda: extract_outputs(extractor.outputs, [images], chunk=extractor.chunk))
    return Speed(flops, seconds / len(images))


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
