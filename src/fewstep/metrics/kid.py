"""Kernel Inception Distance (Bińkowski et al. 2018, arXiv:1801.01401, section 4)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.metrics.features import check_features
from fewstep.metrics.mmd import cubic_kernel, unbiased_mmd2


@dataclass(frozen=True)
class Kid:
    """KID and its uncertainty.

    Args:
        value: mean over subsets, unbiased; for equal distributions it is negative half the time.
        std: over subsets, as usually published. It is the spread of single subsets, so more images
            do not lower it.
        error: standard error of `value`.
    """

    value: float
    std: float
    error: float


def kid(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Kid:
    """Mean unbiased squared MMD, under the cubic kernel, of random subsets of two feature sets.

    Subsets of one data set overlap, so their std divided by the square root of their number is not
    the error of the mean. A mean over m of N rows, drawn without replacement, varies between
    subsets with (N - m) / m times the variance of the mean over all N between data sets. `error`
    inverts this, and adds the variance due to the finite number of subsets. Close to distance 0 it
    is too large, by up to the square root of N / m.

    Args:
        a, b: features, shapes (N, d) and (M, d).
        subsets: how many, at least 2.
        subset_size: rows of each, at least 2.
        seed: of the draws.

    Raises:
        ValueError: features that do not fit together or are not finite, or at most subset_size
            rows.
    """
    check_features(a, b)
    smaller = min(len(a), len(b))
    if not 2 <= subset_size < smaller or subsets < 2:
        raise ValueError(
            f"need at least 2 subsets of 2 to {smaller - 1} images, got {subsets} of {subset_size} "
            "(params.yaml: metric.kid.subsets, metric.kid.subset_size)"
        )
    rng = np.random.default_rng(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        rows, columns = (rng.choice(len(x), subset_size, replace=False) for x in (a, b))
        values[i] = unbiased_mmd2(a[rows], b[columns], cubic_kernel)
    variance = values.var(ddof=1)
    error = np.sqrt(variance * (1 / subsets + subset_size / (smaller - subset_size)))
    return Kid(float(values.mean()), float(np.sqrt(variance)), float(error))
