"""How much arithmetic a network needs, and how fast a device is."""

import time
from copy import deepcopy

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.method import Method
from fewstep.networks.compute import allow_tf32
from fewstep.networks.denoiser import PRECISIONS, Denoiser
from fewstep.params import Params


def forward_flops(denoiser: Denoiser, params: Params) -> tuple[int, int]:
    """FLOPs of one image's forward pass, and of its encoder alone, counted on the meta device.

    A multiply-add counts as 2. Only matrix products and convolutions count.
    """
    d = params.data
    network = deepcopy(denoiser).eval().to("meta")
    x = torch.empty(1, d.channels, d.resolution, d.resolution, device="meta")
    sigma, labels = torch.empty(1, device="meta"), torch.empty(1, d.classes, device="meta")
    counts = []
    for part in (network, network.bottleneck):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(x, sigma, labels)
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def image_flops(method: Method, params: Params) -> float:
    """Average FLOPs of training on one image."""
    forward, encoder = forward_flops(method.student, params)
    return forward * method.forwards(encoder / forward)


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product in that precision, measured now."""
    allow_tf32(precision == "tf32")
    n = 8192 if device.type == "cuda" else 512  # milliseconds, which a busy machine interrupts less
    a = torch.randn(n, n, device=device).to(PRECISIONS[precision])
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)  # the best: other processes slow some of them down
