"""How much arithmetic a network needs, and how much the device can do."""

import time
from copy import deepcopy

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.denoiser import PRECISIONS, Denoiser
from fewstep.params import Params
from fewstep.performance import allow_tf32


def forward_flops(denoiser: Denoiser, params: Params) -> tuple[int, int]:
    """FLOPs of one image's forward pass, and of its encoder's part; nothing is computed.

    A multiply-add is 2. Only matrix products and convolutions count.
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


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product in that precision, the best of 6, measured now."""
    allow_tf32(precision == "tf32")
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(PRECISIONS[precision])
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)  # what the device can do, not what others left of it
