"""Averages of weights: half-life with ramp-up (EDM), power-function and post-hoc (EDM2)."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def half_life_beta(batch: int, nimg: int, kimg: float, rampup: float = 0.0) -> float:
    """Decay of an update of `batch` images that follows nimg earlier ones.

    Args:
        kimg: half-life in thousands of images.
        rampup: limits the half-life to this share of nimg; 0 = no limit.
    """
    half_life = kimg * 1000
    if rampup:
        half_life = min(half_life, nimg * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))  # 0 at nimg 0: initial weights do not count


def std_to_exponent(std: float) -> float:
    """Exponent gamma of the power-function profile of relative width std (EDM2, eq. 123).

    Raises:
        ValueError: std is outside (0, 0.289); the upper end is the plain mean, with exponent 0.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"need 0 < std < 0.289, got {std} (ema.std, phema.stds or --std)")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def power_beta(batch: int, nimg_after: int, std: float) -> float:
    """Decay of an update of the power-function profile; nimg_after includes its images (EDM2)."""
    return (1 - batch / nimg_after) ** (std_to_exponent(std) + 1)


def posthoc_coefficients(
    in_nimg: Iterable[float],
    in_std: Iterable[float],
    out_nimg: Iterable[float],
    out_std: Iterable[float],
) -> np.ndarray:
    """Weights X (inputs, outputs) that rebuild profiles; each column sums to 1 (EDM2, section C).

    The sum of X[i] times the snapshot of time in_nimg[i] and width in_std[i] is the least-squares
    approximation of the snapshot of time out_nimg and width out_std.
    """
    t_in, t_out = np.array([*in_nimg], float), np.array([*out_nimg], float)
    g_in, g_out = (np.array([std_to_exponent(s) for s in stds]) for stds in (in_std, out_std))
    inputs = _profile_product(t_in[:, None], g_in[:, None], t_in, g_in)
    outputs = _profile_product(t_in[:, None], g_in[:, None], t_out, g_out)
    X = np.linalg.solve(inputs, outputs)
    return X / X.sum(axis=0)


def _profile_product(
    t_a: np.ndarray, g_a: np.ndarray, t_b: np.ndarray, g_b: np.ndarray
) -> np.ndarray:
    """Inner product of power-function profiles with end times t and exponents g (EDM2, eq. 133)."""
    ratio = t_a / t_b
    power = np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * ratio**power / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


@torch.no_grad()
def update_average(
    average: Iterable[Tensor], weights: Iterable[Tensor], beta: float, foreach: bool = True
) -> None:
    """average <- beta average + (1 - beta) weights, in place.

    `foreach` updates all tensors in a few kernels, which a GPU launches much faster than one each.
    """
    if foreach:
        get_ema_multi_avg_fn(beta)(list(average), list(weights), 0)
        return
    for a, w in zip(average, weights, strict=True):
        a.lerp_(w, 1 - beta)
