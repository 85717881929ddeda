"""Is model A better than B, or is it only the seeds? Bootstrap (Efron & Tibshirani 1993)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.metrics.features import check_features

Features = NDArray[np.floating]
Score = Callable[[Features], float]


@dataclass(frozen=True)
class Difference:
    """The difference between the scores of A and B, and its uncertainty.

    Args:
        value: a - b.
        low, high: ends of the interval.
        confidence: probability that the interval contains the difference in the limit of images.
        error: standard deviation over resamples.
    """

    a: float
    b: float
    value: float
    low: float
    high: float
    confidence: float
    error: float
    resamples: int

    @property
    def exceeds_noise(self) -> bool:
        """Whether 0 lies outside the interval."""
        return not self.low <= 0 <= self.high


def compare(
    a: Features,
    b: Features,
    metric: Score,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    paired: bool = True,
) -> Difference:
    """The difference of a metric between two sets of samples, with an interval.

    Rows are resampled with replacement. If the sets are paired, A and B get the same rows: images
    of one seed and class resemble each other, so their common noise cancels. Repeated images make
    a set less diverse, so resamples score worse than their originals, by about as much for both
    models. The percentile interval is therefore shifted from the mean of the resamples to the
    difference of the originals. The reference is not resampled: the interval is for this one.

    Args:
        a, b: features, shapes (N, d) and (M, d); paired: row i of both from seed i, so N = M.
        metric: for example `lambda x: frechet_distance(gaussian_stats(x), reference)`.
        resamples: calls of `metric` for each of the two, at least 2.
        confidence: of the interval, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: features that do not fit together or are not finite, or bad settings.
    """
    check_features(a, b)
    if paired and len(a) != len(b):
        raise ValueError(
            f"need as many images from A as from B to compare them seed by seed, got {len(a)} and "
            f"{len(b)} (params.yaml: generate.images)"
        )

    def difference(i: NDArray[np.integer], j: NDArray[np.integer]) -> float:
        return metric(a[i]) - metric(b[j])

    found = _bootstrap([a, b], difference, resamples, seed, confidence, paired=paired)
    ours, theirs = metric(a), metric(b)
    shift = ours - theirs - found.bootstrap_distribution.mean()
    return Difference(
        a=ours,
        b=theirs,
        value=ours - theirs,
        low=float(shift + found.confidence_interval.low),
        high=float(shift + found.confidence_interval.high),
        confidence=confidence,
        error=float(found.standard_error),
        resamples=resamples,
    )


def bootstrap_error(features: Features, metric: Score, resamples: int, seed: int = 0) -> float:
    """Standard deviation of a metric over resamples of its images, drawn with replacement.

    It estimates how much the value varies between ranges of as many seeds.
    """
    found = _bootstrap([features], lambda i: metric(features[i]), resamples, seed)
    return float(found.standard_error)


def _bootstrap(
    sets: Sequence[Features],
    score: Callable[..., float],
    resamples: int,
    seed: int,
    confidence: float = 0.95,
    paired: bool = False,
) -> Any:  # noqa: ANN401
    """scipy's bootstrap over row indices, because it only resamples along one axis of numbers."""
    from scipy.stats import bootstrap  # imported here: it takes most of a second

    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            "need 2 or more resamples and a confidence in (0, 1), got "
            f"{resamples} and {confidence} (params.yaml: metric.bootstrap)"
        )
    return bootstrap(
        [np.arange(len(rows)) for rows in sets],
        score,
        n_resamples=resamples,
        batch=1,  # one resample in memory at a time; the draws then depend only on the seed
        vectorized=False,
        method="percentile",
        confidence_level=confidence,
        paired=paired,
        rng=np.random.default_rng(seed),
    )
