"""Are samples copies of training images? Their nearest neighbours, against those of real images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.metrics.features import check_features
from fewstep.metrics.neighbours import Device, nearest


@dataclass(frozen=True)
class Memorisation:
    """The nearest training images of each sample, and the share of samples that are too near.

    Args:
        indices: of training images, nearest first, (N, k).
        distances: to them, (N, k).
        real_distances: of real images to their nearest others among the training images.
        threshold: the `expected` quantile of `real_distances`.
        share: of samples within the threshold. For new images from the data's distribution it is
            about `expected`; a multiple of that means that training images are reproduced.
    """

    indices: NDArray[np.int64]
    distances: NDArray[np.float64]
    real_distances: NDArray[np.float64]
    threshold: float
    share: float


def memorisation(
    samples: NDArray[np.floating],
    training: NDArray[np.floating],
    k: int = 3,
    expected: float = 0.01,
    device: Device = "cpu",
    real_distances: NDArray[np.float64] | None = None,
) -> Memorisation:
    """Nearest training images of samples, and the share of near-duplicates among the samples.

    As many real images as samples, evenly spread over the training images, show how near another
    real image usually is.

    Args:
        samples, training: features, shapes (N, d) and (M, d).
        k: neighbours to report.
        expected: share of real images that count as near-duplicates of others, in (0, 1).
        device: where distances are computed, in float64.
        real_distances: of `real_spacing` for as many images; None computes them.

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
    if real_distances is None:
        real_distances = real_spacing(training, len(samples), device)
    threshold = float(np.quantile(real_distances, expected))
    share = float((distances[:, 0] <= threshold).mean())
    return Memorisation(indices, distances, real_distances, threshold, share)


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
    """From differences, which are exactly 0 for copies; `nearest` rounds, as it multiplies."""
    columns = [
        np.linalg.norm(queries.astype(np.float64) - references[neighbour], axis=1)
        for neighbour in indices.T
    ]
    return np.stack(columns, axis=1)
