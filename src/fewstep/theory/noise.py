"""Noise levels: the Karras schedule, student and teacher grids, and the choice of teacher edges.

sigma is the noise std in data units (pixels in [-1, 1]). Grids are float64 and descending.
A node is a sigma of a grid; edge k leads from node k to node k + 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

EDM_LEVELS = -1.2, 1.2  # mean and std of log sigma in EDM's training (Table 1)


class Levels(Protocol):
    """What is asked of a block of params, such as `noise`."""

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def rho(self) -> float: ...


@dataclass(frozen=True)
class Schedule:
    """The Karras schedule: sigmas from sigma_max to sigma_min, uniform in sigma^(1/rho)."""

    sigma_min: float
    sigma_max: float
    rho: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max} "
                "(params.yaml: noise)"
            )

    @classmethod
    def of(cls, levels: Levels) -> "Schedule":
        return cls(levels.sigma_min, levels.sigma_max, levels.rho)

    @classmethod
    def of_model(cls, about: Mapping[str, Any], otherwise: Levels) -> "Schedule":
        """The schedule that a model was trained to be sampled on, as its JSON says.

        Args:
            about: the JSON.
            otherwise: the levels of a model that says nothing, such as a teacher.

        Raises:
            ValueError: what it says is no schedule.
        """
        own = about.get("sampling")
        if own is None:
            return cls.of(otherwise)
        try:
            found = cls(*(float(own[key]) for key in ("sigma_min", "sigma_max", "rho")))
            found.sigmas(2)  # some powers cannot be computed
            return found
        except (TypeError, KeyError, ValueError, ArithmeticError) as error:
            raise ValueError(
                f"need sigma_min, sigma_max and rho in `sampling` of the model's JSON, got {own!r}"
            ) from error

    def sigmas(self, n: int) -> Tensor:
        """n descending sigmas from sigma_max to sigma_min, shape (n,), float64 (EDM, eq. 5)."""
        if n < 1:
            raise ValueError(f"need at least 1 noise level, got {n}")
        ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = (high + ramp * (low - high)) ** self.rho
        sigmas[0] = self.sigma_max  # exactly; the powers above round
        if n > 1:
            sigmas[-1] = self.sigma_min
        return sigmas

    def nodes(self, steps: int) -> Tensor:
        """The nodes of `steps` steps down to the clean image: sigmas, then 0, (steps + 1,)."""
        return with_zero(self.sigmas(steps))


def per_image(values: Tensor) -> Tensor:
    """Numbers (B,), or a single one, as (B, 1, 1, 1), which broadcasts over images."""
    return values.reshape(-1, 1, 1, 1)


def with_zero(sigmas: Tensor) -> Tensor:
    """The grid (n,) with a last node added for the clean image, sigma = 0: (n + 1,)."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def annealed_teacher_edges(kimg: float, start: int, end: int, anneal_kimg: float) -> int:
    """Number of teacher edges after kimg thousand images: log-linear from start to end."""
    if anneal_kimg <= 0:
        return end
    ratio = min(kimg / anneal_kimg, 1.0)
    return round(math.exp(math.log(start) + ratio * (math.log(end) - math.log(start))))


@lru_cache(maxsize=64)
def _teacher_sigmas(edges: int, student: tuple[float, ...], rho: float) -> Tensor:
    interior = torch.tensor(student[1:-1], dtype=torch.float64)
    sigma_max, sigma_min, raw = student[0], student[-2], edges
    while True:
        nodes = Schedule(sigma_min, sigma_max, rho).sigmas(raw)
        # The reference's tolerance. Above 5,000 edges it also drops nodes that merely lie close.
        larger = torch.maximum(nodes[:, None], interior[None]).clamp(min=1.0)
        near = (nodes[:, None] - interior).abs() <= 1e-5 * larger + 1e-5 * interior
        drop = near.any(dim=1)
        drop[0] = drop[-1] = False
        if int((~drop).sum()) >= edges:
            return with_zero(nodes[~drop])
        raw += 1


def teacher_sigmas(edges: int, student: Tensor, rho: float) -> Tensor:
    """Teacher grid of at least `edges` edges, shape (edges' + 1,), from student[0] to 0.

    Like the reference, it drops nodes that coincide with an interior student node and refines the
    grid until `edges` are left; the ends always stay. Every student boundary then lies strictly
    inside an edge, so the student is never trained exactly at its own inner sampling nodes.
    """
    return _teacher_sigmas(edges, tuple(student.tolist()), rho).clone()


def segments(teacher: Tensor, student: Tensor) -> Tensor:
    """First and last teacher edge (inclusive) of each student segment, int64, shape (S, 2).

    Segment j owns the edges k with student[j + 1] < teacher[k] <= student[j]. A segment without any
    takes the edge whose node is nearest to its lower boundary.
    """
    nodes = teacher[:-1]
    bounds = []
    for upper, lower in zip(student[:-1], student[1:], strict=True):
        inside = torch.nonzero((nodes > lower) & (nodes <= upper)).flatten()
        if len(inside) == 0:
            inside = (nodes - lower).abs().argmin().reshape(1)
        bounds.append((int(inside[0]), int(inside[-1])))
    return torch.tensor(bounds)


def edge_probability(
    teacher: Tensor,
    bounds: Tensor,
    kind: str,
    terminal_anchor: bool,
    rho: float,
    uniform_share: float = 0.0,
) -> Tensor:
    """Probability of drawing each teacher edge, float32, shape (edges,).

    `uniform` is uniform over segments, then over the edges of a segment. `edm` is EDM's log-normal
    training density, re-expressed on a grid uniform in sigma^(1/rho); `vp` does the same with a
    variance-preserving density. Under vp and edm, `terminal_anchor` raises the last edge (sigma_min
    to 0) to probability 1 / edges, without which it would get fewer than 3 of 100,000 images.
    `uniform_share` of the draws follow `uniform` instead.

    Raises:
        ValueError: unknown kind.
    """
    sigma = teacher[:-1].to(torch.float32)
    uniform = torch.zeros_like(sigma)
    for first, last in bounds.tolist():
        uniform[first : last + 1] += 1 / (len(bounds) * (last - first + 1))
    if kind == "uniform":
        return uniform
    if kind == "vp":
        p = (sigma + 1e-10) ** (1 - 1 / rho) / (1 + sigma**2)
    elif kind == "edm":
        P_mean, P_std = EDM_LEVELS
        z = ((sigma + 1e-10).log() - P_mean) / P_std
        p = (sigma + 1e-10) ** (-1 / rho) * (-0.5 * z**2).exp()
    else:
        raise ValueError(f"need edges uniform, vp or edm, got {kind!r} (settings.edges)")
    p = p / p.sum()
    if terminal_anchor and len(p) > 1:
        anchor = 1 / len(p)
        p = p * ((1 - anchor) / p[:-1].sum())
        p[-1] = anchor
    return p + uniform_share * (uniform - p)


def lognormal_sigmas(z: Tensor, P_mean: float, P_std: float) -> Tensor:
    """Training sigmas exp(P_mean + P_std z) for standard normal z (EDM, Table 1)."""
    return (P_mean + P_std * z).exp()
