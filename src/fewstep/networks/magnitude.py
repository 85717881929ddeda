"""Layers that preserve magnitudes (EDM2: Karras et al. 2024, arXiv:2312.02696, appendix B).

A magnitude is a root mean square. Where inputs have magnitude 1, outputs have it too, in
expectation. So no layer needs a bias or a learned norm, and updates keep their relative size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.layers import memory_format_of

EPSILON = 1e-4  # added to each magnitude that is divided by
_SILU = 0.596  # magnitude of SiLU of a standard normal variable


def normalise(x: Tensor, *dims: int) -> Tensor:
    """x divided by its magnitude over these dimensions, to magnitude 1 (EDM2, Algorithm 1)."""
    count = math.prod([x.shape[dim] for dim in dims])  # a generator would end a compiled graph
    # float32: half precision cannot hold the sum of so many squares
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (norm / math.sqrt(count) + EPSILON).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of magnitude 1 for a standard normal x (EDM2, eq. 81)."""
    return F.silu(x) / _SILU


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b of two uncorrelated tensors, at their magnitude (EDM2, eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b along the channels, of which b has the share t of the magnitude (EDM2, eq. 103).

    Args:
        a, b: (B, C, H, W), of any number of channels each.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    both = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (both * (1 - t) / n_a**0.5), b * (both * t / n_b**0.5)], dim=1)


class Fourier(nn.Module):
    """sqrt(2) cos(2 pi (f c + p)) of numbers c (B,), float32 (B, channels) (EDM2, eq. 75).

    The buffers `freqs` and `phases` are 2 pi f and 2 pi p, as in published checkpoints: f is
    standard normal, p uniform in [0, 1).
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c: Tensor) -> Tensor:
        return math.sqrt(2) * (c.to(torch.float32).outer(self.freqs) + self.phases).cos()


class MPConv(nn.Module):
    """A kernel x kernel convolution, or a linear map for kernel 0, of weights of magnitude 1.

    The weights of each output are normalised whenever they are used, so that their own magnitude
    does not matter, and gradients are orthogonal to them. `force` keeps that magnitude from
    growing, which would shrink the updates in relation (EDM2, Algorithm 1).
    """

    def __init__(self, n_in: int, n_out: int, kernel: int = 0) -> None:
        super().__init__()
        weight = torch.randn(n_out, n_in, *(kernel, kernel)[: 2 * bool(kernel)])
        self.weight = nn.Parameter(self.normalised(weight))

    @staticmethod
    def normalised(weight: Tensor) -> Tensor:
        return normalise(weight, *range(1, weight.ndim))

    def scaled(self, dtype: torch.dtype, gain: Tensor | float = 1.0) -> Tensor:
        """The weights in use: those of an output have the norm `gain`, for any number of inputs."""
        fan_in = self.weight[0].numel()
        return (self.normalised(self.weight) * (gain / math.sqrt(fan_in))).to(dtype)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.scaled(x.dtype, gain)
        if weight.ndim == 2:
            return F.linear(x, weight)
        weight = weight.contiguous(memory_format=memory_format_of(x))
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def force(self) -> None:
        """Set the weights of each output to magnitude 1 (EDM2, eq. 66)."""
        self.weight.copy_(self.normalised(self.weight))


class Uncertainty(nn.Module):
    """u(sigma), (B,), from c_noise (B,): ln of the loss expected there (EDM2, eqs. 14-16, 21)."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.fourier, self.linear = Fourier(channels), MPConv(channels, 1)

    def forward(self, c_noise: Tensor) -> Tensor:
        return self.linear(self.fourier(c_noise)).squeeze(1)
