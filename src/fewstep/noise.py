"""Noise levels: the Karras schedule, student and teacher grids, which teacher edge to train on.

sigma is the noise std in data units (pixels in [-1, 1]). Grids are float64, descending.
A node is a sigma of a grid; edge k leads from node k to node k + 1.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """n descending sigmas from sigma_max to sigma_min, shape (n,), float64 (EDM, eq. 5)."""
    if n < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"need n >= 1 and 0 < sigma_min < sigma_max, got {n}, {sigma_min}, {sigma_max} "
            "(params.yaml: noise)"
        )
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[0] = sigma_max
    if n > 1:
        sigmas[-1] = sigma_min
    return sigmas


def per_image(values: Tensor) -> Tensor:
    """Numbers (B,), or one number, as a column (B, 1, 1, 1) beside images."""
    return values.reshape(-1, 1, 1, 1)


def with_zero(sigmas: Tensor) -> Tensor:
    """The grid (n,) with the clean image, sigma = 0, as its last node: (n + 1,)."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def student_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Nodes of a student of `steps` steps, shape (steps + 1,): Karras, then 0."""
    return with_zero(karras_sigmas(steps, sigma_min, sigma_max, rho))


def annealed_teacher_edges(kimg: float, start: int, end: int, anneal_kimg: float) -> int:
    """Number of teacher edges after kimg thousand images: log-linear from start to end."""
    if anneal_kimg <= 0:
        return end
    ratio = min(max(kimg / anneal_kimg, 0.0), 1.0)
    edges = round(math.exp(math.log(start) + ratio * (math.log(end) - math.log(start))))
    return min(max(edges, start), end)


@lru_cache(maxsize=64)
def _teacher_sigmas(edges: int, student: tuple[float, ...], rho: float) -> Tensor:
    interior = torch.tensor(student[1:-1], dtype=torch.float64)
    sigma_max, sigma_min = student[0], student[-2]
    raw = edges
    while True:
        nodes = karras_sigmas(raw, sigma_min, sigma_max, rho)
        larger = torch.maximum(nodes[:, None], interior[None]).clamp(min=1.0)
        near = (nodes[:, None] - interior).abs() <= 1e-5 * larger + 1e-5 * interior
        drop = near.any(dim=1)
        drop[0] = drop[-1] = False
        if int((~drop).sum()) >= edges:
            return with_zero(nodes[~drop])
        raw += 1


def teacher_sigmas(edges: int, student: Tensor, rho: float = 7.0) -> Tensor:
    """Teacher grid of at least `edges` edges, shape (edges' + 1,), from student[0] to 0.

    Nodes that coincide with an interior student node are left out, so that every student boundary
    lies strictly inside an edge; the grid is refined until `edges` are left. Ends always stay.
    """
    return _teacher_sigmas(edges, tuple(student.tolist()), rho).clone()


def segments(teacher: Tensor, student: Tensor) -> Tensor:
    """First and last teacher edge (inclusive) of each student segment, int64, shape (S, 2).

    Segment j owns the edges k with student[j + 1] < teacher[k] <= student[j]. An empty one takes
    the edge whose node is nearest to its lower boundary.
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
    rho: float = 7.0,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    uniform_share: float = 0.0,
) -> Tensor:
    """Probability of drawing each teacher edge, float32, shape (edges,).

    `uniform`: uniform over segments, then over the edges of one. `edm`: EDM's log-normal training
    density on a grid that is uniform in sigma^(1/rho). `vp`: the same for a variance-preserving
    density. `terminal_anchor` gives the last edge (sigma_min to 0) the probability 1 / edges of a
    vp or edm distribution. `uniform_share` of the draws are made as `uniform` makes them.

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


def lognormal_sigmas(z: Tensor, P_mean: float = -1.2, P_std: float = 1.2) -> Tensor:
    """Training sigmas exp(P_mean + P_std z) of standard normal z (EDM, Table 1)."""
    return (P_mean + P_std * z).exp()
