"""Are samples copies of training images? Nearest neighbours, measured by those of real images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.metrics.features import check_features
from fewstep.metrics.neighbours import Device, nearest


@dataclass(frozen=True)
class Memorisation:
    """The training images nearest to each sample, and how many of them are too near.

    Args:
        indices: of training images, nearest first, (N, k).
        distances: to them, (N, k).
        real_distances: of real images to their nearest others among the training images.
        threshold: the distance that a share of `expected` of the real images stays within.
        share: of samples within the threshold. That of new images from the data's distribution
            is about `expected`; a multiple of it says that training images come back.
        expected: the quantile that the threshold stands at.
    """

    indices: NDArray[np.int64]
    distances: NDArray[np.float64]
    real_distances: NDArray[np.float64]
    threshold: float
    share: float
    expected: float


def memorisation(
    samples: NDArray[np.floating],
    training: NDArray[np.floating],
    k: int = 3,
    expected: float = 0.01,
    device: Device = "cpu",
    real_distances: NDArray[np.float64] | None = None,
) -> Memorisation:
    """Nearest training images of samples, and the share of near-duplicates among the samples.

    As many real images as there are samples, evenly spread over the training images, show how
    near another real image usually is.

    Args:
        samples, training: features, shapes (N, d) and (M, d).
        k: neighbours to report.
        expected: share of real images that count as near-duplicates of others, in (0, 1).
        device: where distances are computed, in float64.
        real_distances: what `real_spacing` gave for as many images; None computes it.

    Raises:
        ValueError: features that do not fit together or are not finite, too few of them, or
            `expected` outside (0, 1).
    """
    check_features(samples, training, least=1)
    if not 1 <= k < len(training) or not 0 < expected < 1:
        raise ValueError(
            f"need 1 to {len(training) - 1} neighbours and an expected share in (0, 1), got {k} "
            f"and {expected} (params.yaml: metric.memorisation.k, metric.memorisation.expected)"
        )
    _, indices = nearest(samples, training, k, device)
    distances = _distances(samples, training, indices)
    real = real_distances
    if real is None:
        real = real_spacing(training, len(samples), device)
    threshold = float(np.quantile(real, expected))
    share = float((distances[:, 0] <= threshold).mean())
    return Memorisation(indices, distances, real, threshold, share, expected)


def real_spacing(
    training: NDArray[np.floating], count: int, device: Device = "cpu"
) -> NDArray[np.float64]:
    """Distances of `count` training images, evenly spread, to their nearest others, (count,)."""
    own = np.linspace(0, len(training) - 1, min(count, len(training))).astype(np.int64)
    _, others = nearest(training[own], training, 1, device, skip=own)
    return _distances(training[own], training, others)[:, 0]


def _distances(
    queries: NDArray[np.floating], references: NDArray[np.floating], indices: NDArray[np.int64]
) -> NDArray[np.float64]:
    """From differences: those of copies are 0 exactly, which a product of matrices misses."""
    columns = [
        np.linalg.norm(queries.astype(np.float64) - references[neighbour], axis=1)
        for neighbour in indices.T
    ]
    return np.stack(columns, axis=1)
