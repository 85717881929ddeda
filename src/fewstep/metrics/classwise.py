"""Fréchet distance class by class: which classes does a model draw badly?"""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.metrics.features import check_features
from fewstep.metrics.frechet import one_thread


def class_distances(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    reference: NDArray[np.floating],
    reference_labels: NDArray[np.integer],
) -> dict[int, float]:
    """Fréchet distance between the images of a class and the real ones of that class.

    Fewer images make it larger, so only compare classes or models with equal numbers of images.

    Args:
        features, reference: shapes (N, d) and (M, d).
        labels, reference_labels: classes of the rows, shapes (N,) and (M,).

    Returns:
        By class, in order, for the classes in `labels`. Warns if a class has fewer than d + 1
        images, because its covariance is then singular.

    Raises:
        ValueError: features that do not fit together or are not finite, labels of another length,
            or fewer than 2 images of a class on either side.
    """
    check_features(features, reference)
    for x, y in ((features, labels), (reference, reference_labels)):
        if y.shape != (len(x),):
            raise ValueError(f"need a label for each of {len(x)} images, got shape {y.shape}")
    distances: dict[int, float] = {}
    fewest = len(features)
    for label in np.unique(labels).tolist():
        ours, real = features[labels == label], reference[reference_labels == label]
        if min(len(ours), len(real)) < 2:
            raise ValueError(
                f"need at least 2 images of class {label} on either side, got {len(ours)} and "
                f"{len(real)} (params.yaml: generate.images, metric.reference_images)"
            )
        fewest = min(fewest, len(ours), len(real))
        distances[label] = small_sample_distance(ours, real)
    if fewest < features.shape[1] + 1:
        warnings.warn(
            f"need {features.shape[1] + 1} images of each class for covariances of full rank, got "
            f"{fewest}: class distances are biased (params.yaml: generate.images)",
            stacklevel=2,
        )
    return distances


def small_sample_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Fréchet distance of two feature sets; its cost grows with the images instead of d cubed.

    With centred rows X and Y, the covariances are X^T X / (n - 1) and Y^T Y / (m - 1), and
    tr((AB)^1/2) is the sum of the singular values of X Y^T / ((n - 1)(m - 1))^1/2. With more rows
    than d, the triangle R of X = QR replaces X, because Q does not change the singular values.

    Args:
        a, b: shapes (n, d) and (m, d), n and m at least 2.
    """
    x, y = (f - f.mean(axis=0, dtype=np.float64) for f in (a, b))
    offset = np.square(a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)).sum()
    traces = np.square(x).sum() / (len(x) - 1) + np.square(y).sum() / (len(y) - 1)
    with one_thread():
        overlap = torch.linalg.svdvals(_short(x) @ _short(y).T).sum()
    overlap = float(overlap) / ((len(x) - 1) * (len(y) - 1)) ** 0.5
    return max(float(offset + traces - 2 * overlap), 0.0)


def _short(x: NDArray[np.float64]) -> torch.Tensor:
    """X, or R of X = QR if X has more rows than columns."""
    rows = torch.from_numpy(x)
    return torch.linalg.qr(rows, mode="r").R if len(x) > x.shape[1] else rows
