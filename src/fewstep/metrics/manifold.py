"""Fidelity and diversity separately, from balls around samples up to their k-th neighbours.

Precision and recall: Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2. Density and
coverage: Naeem et al. 2020, arXiv:2002.09797, section 3.

A ball contains its edge. Where images come several times, many distances equal a radius, or both
are 0; of two equal distances rounding would make one the larger. So radii are longer by what
rounding can be, a millionth of the features' length at most.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.metrics.features import check_features
from fewstep.metrics.neighbours import ROUNDING, Device, distance_blocks, nearest


@dataclass(frozen=True)
class Manifold:
    """All but density are in [0, 1].

    Args:
        precision: share of fakes in any ball around a real image.
        recall: share of reals in any ball around a fake.
        density: mean number of real balls around a fake, over k; 1 for equal distributions.
        coverage: share of real balls with a fake inside; about 1 - 2^-k for equal distributions
            and as many fakes as reals.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    real: NDArray[np.floating],
    fake: NDArray[np.floating],
    k: int = 3,
    density_k: int = 5,
    device: Device = "cpu",
) -> Manifold:
    """Precision, recall, density and coverage; all depend on both numbers of images.

    Args:
        real, fake: features, shapes (n, d) and (m, d).
        k: the neighbour that ends the balls of precision and recall, without the centre itself.
        density_k: the same for density and coverage.
        device: where distances are computed, in float64.

    Raises:
        ValueError: features that do not fit together or are not finite, or too few of them.
    """
    if min(k, density_k) < 1:
        raise ValueError(
            f"need k >= 1, got {k} and {density_k} (params.yaml: metric.manifold.k, "
            "metric.manifold.density_k)"
        )
    check_features(real, fake, least=max(k, density_k) + 1)
    centre = real.mean(axis=0, dtype=np.float64)
    real_radii = _radii(real, max(k, density_k), device, centre)
    fake_radii = _radii(fake, k, device, centre)[:, k - 1]
    precise = torch.zeros(len(fake), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    covered, balls = torch.zeros_like(recalled), 0
    for rows, columns, distances in distance_blocks(real, fake, device, centre):
        precise[columns] |= (distances <= real_radii[rows, k - 1, None]).any(0)
        recalled[rows] |= (distances <= fake_radii[columns]).any(1)
        inside = distances <= real_radii[rows, density_k - 1, None]
        covered[rows] |= inside.any(1)
        balls += int(inside.sum())
    return Manifold(
        precision=int(precise.sum()) / len(fake),
        recall=int(recalled.sum()) / len(real),
        density=balls / (density_k * len(fake)),
        coverage=int(covered.sum()) / len(real),
    )


def recall(
    real: NDArray[np.floating], fake: NDArray[np.floating], k: int = 3, device: Device = "cpu"
) -> float:
    """That of `manifold` alone, without the balls around real images, of which there may be more.

    Raises:
        ValueError: features that do not fit together or are not finite, or no more fakes than k.
    """
    check_features(real, fake)
    if len(fake) <= k:
        raise ValueError(f"need more than k = {k} images, got {len(fake)}")
    centre = real.mean(axis=0, dtype=np.float64)
    radii = _radii(fake, k, device, centre)[:, k - 1]
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows, columns, distances in distance_blocks(real, fake, device, centre):
        recalled[rows] |= (distances <= radii[columns]).any(1)
    return int(recalled.sum()) / len(real)


def _radii(
    features: NDArray[np.floating], k: int, device: Device, centre: NDArray[np.float64]
) -> torch.Tensor:
    """Distances to the k nearest others, nearest first, (n, k); longer by their rounding.

    Of a y on the edge of the ball around x, |y|^2 <= 2 |x|^2 + 2 r^2.
    """
    own = np.arange(len(features))
    radii, _ = nearest(features, features, k, device, own, centre)
    length = np.square(features - centre).sum(axis=1, keepdims=True)
    squared = np.square(radii) + ROUNDING * (3 * length + 2 * np.square(radii))
    return torch.from_numpy(np.sqrt(squared)).to(device)
