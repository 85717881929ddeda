"""Group normalisation, scale, shift and SiLU as one kernel for CPUs, compiled by numba.

PyTorch needs three kernels for this, and its GroupNorm reads channels-last images one group at a
time: 4 channels in small networks, a fraction of a cache line. Here an image is read twice and
stays in the cache in between. One thread computes a whole image in a fixed order, so neither the
number of threads nor the batch changes a bit of the result.

Raises ImportError when numba is missing (it is the extra `fewstep[cpu]`) or may not compile.
"""

from typing import Any

import numpy as np
import torch
from numba import config, get_num_threads, njit, prange, set_num_threads, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
    # `overload` has no effect then, so that read() would return None
    raise ImportError("NUMBA_DISABLE_JIT is set")

# numba's first call may take over PyTorch's OpenMP pool and reset its thread count; restore it
_wanted = torch.get_num_threads()
THREADS = get_num_threads()
torch.set_num_threads(_wanted)

Array = NDArray[Any]
f4, u4 = np.float32, np.uint32
BLOCK = 128  # pixels summed in float32, which vectorises; the sums of blocks are float64
NONE = np.empty((0, 0), f4)
compiled = njit(parallel=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})


def suits(x: Tensor) -> bool:
    """Whether the kernels below can take x: float32 or bfloat16 on a CPU, channels last."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return known and x.is_contiguous(memory_format=torch.channels_last)


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    modulation: Tensor | None,
    silu: bool,
) -> Tensor:
    """silu((1 + scale) * group_norm(x) + shift), rounded once at the end; can be differentiated.

    Args:
        x: images (B, C, H, W) for which `suits` is true.
        weight: of the norm, (C,).
        bias: of the norm, (C,).
        groups: how many groups of adjacent channels are normalised separately.
        eps: added to the variance.
        modulation: scale and shift, (B, 2 C); None means 0 and 0.
        silu: whether SiLU follows.
    """
    set_num_threads(min(torch.get_num_threads(), THREADS))
    given = None if modulation is None else modulation.float()
    return _NormSilu.apply(x, weight.float(), bias.float(), given, groups, eps, silu)  # pyright: ignore


class _NormSilu(torch.autograd.Function):
    """Keeps x and its moments; the backward pass recomputes SiLU's input, a multiply-add each."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.channels_last)
        moments = torch.empty(len(x), groups, 2, dtype=torch.float64)
        own = numbers(weight), numbers(bias), numbers(modulation), numbers(moments)
        _forward(pixels(x), *own, eps, silu, pixels(y))
        ctx.save_for_backward(x, weight, bias, modulation, moments)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401  # pyright: ignore
        x, weight, bias, modulation, moments = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        by_image = torch.empty(len(x), 2 * len(weight))
        dm = None if modulation is None else torch.empty_like(modulation)
        own = numbers(weight), numbers(bias), numbers(modulation), numbers(moments)
        _backward(pixels(x), pixels(dy), *own, ctx.silu, pixels(dx), numbers(by_image), numbers(dm))
        dweight, dbias = by_image.sum(dim=0).chunk(2)
        return dx, dweight, dbias, dm, None, None, None


def pixels(x: Tensor) -> Array:
    """Images (B, C, H, W) as (B, H W, C) without a copy; bfloat16, unknown to numpy, as bits."""
    flat = x.detach().permute(0, 2, 3, 1).flatten(1, 2)
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def numbers(t: Tensor | None) -> Array:
    return NONE if t is None else t.detach().numpy()


# --- kernels -----------------------------------------------------------------------------------


def read(v: Any) -> Any:  # noqa: ANN401
    """A float32, or the bits of a bfloat16, as float32."""


def rounded(v: Any, like: Any) -> Any:  # noqa: ANN401
    """A float32 in the type of `like`, rounded to nearest, ties to even."""


@overload(read, inline="always")
def _(v: Any) -> Any:  # noqa: ANN401
    def of_bits(v: Any) -> Any:  # noqa: ANN401
        return u4(u4(v) << u4(16)).view(f4)

    def itself(v: Any) -> Any:  # noqa: ANN401
        return v

    return of_bits if isinstance(v, types.Integer) else itself


@overload(rounded, inline="always")
def _(v: Any, like: Any) -> Any:  # noqa: ANN401
    def to_bits(v: Any, like: Any) -> Any:  # noqa: ANN401
        bits = f4(v).view(u4)
        nearest = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
        return np.uint16(nearest if v == v else u4(0x7FC0))

    def itself(v: Any, like: Any) -> Any:  # noqa: ANN401
        return f4(v)

    return to_bits if isinstance(like, types.Integer) else itself


@njit(inline="always")
def sigmoid(z: Any) -> Any:  # noqa: ANN401
    """1 / (1 + exp(-z)) in float32; exp by its polynomial on [-ln 2 / 2, ln 2 / 2]."""
    x = f4(87) if z < f4(-87) else (f4(-87) if z > f4(87) else -z)  # NaN passes
    n = np.floor(x * f4(1.4426950408889634) + f4(0.5))
    r = x - n * f4(0.693359375) + n * f4(2.12194440e-4)  # x - n ln 2
    p = r * f4(1 / 5040) + f4(1 / 720)
    p = r * p + f4(1 / 120)
    p = r * p + f4(1 / 24)
    p = r * p + f4(1 / 6)
    p = r * p + f4(1 / 2)
    p = r * (r * p) + r + f4(1)
    return f4(1) / (f4(1) + p * u4((np.int32(n) + np.int32(127)) << np.int32(23)).view(f4))


@njit(inline="always")
def affine(n: int, moments: Array, weight: Array, bias: Array, modulation: Array) -> Any:  # noqa: ANN401
    """Factor and summand, (C,) each, that turn image n into SiLU's input: norm and modulation."""
    channels, groups = len(weight), moments.shape[1]
    factor, summand = np.empty(channels, f4), np.empty(channels, f4)
    for c in range(channels):
        mean, inverse = moments[n, c // (channels // groups)]
        scale = 1.0 + (modulation[n, c] if modulation.size else 0.0)
        shift = 0.0 + (modulation[n, channels + c] if modulation.size else 0.0)
        factor[c] = inverse * weight[c] * scale
        summand[c] = (bias[c] - mean * inverse * weight[c]) * scale + shift
    return factor, summand


@compiled
def _forward(
    x: Array,
    weight: Array,
    bias: Array,
    modulation: Array,
    moments: Array,
    eps: float,
    silu: bool,
    y: Array,
) -> None:
    """Fills y and moments: mean and 1 / standard deviation, of each image and group."""
    images, length, channels = x.shape
    groups = moments.shape[1]
    size = channels // groups
    for n in prange(images):
        first, second = np.zeros(channels), np.zeros(channels)
        for start in range(0, length, BLOCK):
            s, q = np.zeros(channels, f4), np.zeros(channels, f4)
            for i in range(start, min(start + BLOCK, length)):
                for c in range(channels):
                    v = read(x[n, i, c])
                    s[c] += v
                    q[c] += v * v
            first += s
            second += q
        for g in range(groups):
            of = slice(g * size, (g + 1) * size)
            mean = first[of].sum() / (size * length)
            variance = second[of].sum() / (size * length) - mean * mean
            if variance < 0:
                variance = 0.0
            moments[n, g] = mean, 1 / np.sqrt(variance + eps)
        factor, summand = affine(n, moments, weight, bias, modulation)
        for i in range(length):
            for c in range(channels):
                z = read(x[n, i, c]) * factor[c] + summand[c]
                y[n, i, c] = rounded(z * sigmoid(z) if silu else z, y[n, i, c])


@compiled
def _backward(
    x: Array,
    dy: Array,
    weight: Array,
    bias: Array,
    modulation: Array,
    moments: Array,
    silu: bool,
    dx: Array,
    dnorm: Array,
    dmodulation: Array,
) -> None:
    """Fills dx, dmodulation, and each image's part of the gradients of weight and bias."""
    images, length, channels = x.shape
    groups = moments.shape[1]
    size = channels // groups
    for n in prange(images):
        factor, summand = affine(n, moments, weight, bias, modulation)
        dz = np.empty((length, channels), f4)
        first, second = np.zeros(channels), np.zeros(channels)  # sums of dz and of dz x
        for start in range(0, length, BLOCK):
            s, q = np.zeros(channels, f4), np.zeros(channels, f4)
            for i in range(start, min(start + BLOCK, length)):
                for c in range(channels):
                    v, d = read(x[n, i, c]), read(dy[n, i, c])
                    if silu:
                        z = v * factor[c] + summand[c]
                        t = sigmoid(z)
                        d *= t * (f4(1) + z * (f4(1) - t))
                    dz[i, c] = d
                    s[c] += d
                    q[c] += d * v
            first += s
            second += q
        of_x, constant = np.empty(channels, f4), np.empty(channels, f4)
        for g in range(groups):
            mean, inverse = moments[n, g]
            a = b = 0.0
            for c in range(g * size, (g + 1) * size):
                normed = inverse * (second[c] - mean * first[c])  # of dz x^, x^ the normed x
                scale = 1.0
                if modulation.size:
                    scale += modulation[n, c]
                    dmodulation[n, c] = weight[c] * normed + bias[c] * first[c]
                    dmodulation[n, channels + c] = first[c]
                dnorm[n, c] = scale * normed
                dnorm[n, channels + c] = scale * first[c]
                a += scale * weight[c] * first[c] / (size * length)
                b += scale * weight[c] * normed / (size * length)
            of_x[g * size : (g + 1) * size] = -inverse * inverse * b
            constant[g * size : (g + 1) * size] = inverse * (inverse * mean * b - a)
        for i in range(length):
            for c in range(channels):
                d = factor[c] * dz[i, c] + of_x[c] * read(x[n, i, c]) + constant[c]
                dx[n, i, c] = rounded(d, dx[n, i, c])
