"""Is model A better than model B, or is it the seeds? Bootstrap (Efron & Tibshirani 1993)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.metrics.features import check_features

Features = NDArray[np.floating]


@dataclass(frozen=True)
class Difference:
    """What A scores more than B, and how sure that is.

    Args:
        a, b: the two scores.
        value: a - b.
        low, high: ends of the interval.
        confidence: with which the interval holds the difference that more images would show.
        error: standard deviation over resamples.
        resamples: how many there were.
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
    metric: Callable[[Features], float],
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    paired: bool = True,
) -> Difference:
    """The difference of a metric between two sets of samples, with an interval.

    Rows are resampled with return, the same ones of A and of B where they are paired: images of
    one seed and one class resemble each other, so their common noise cancels. A set with repeated
    images is less diverse, so resamples score worse than their originals, both models by about the
    same; the interval is that of the differences around their own mean, put around the difference
    of the originals. The reference is not resampled: the interval holds for this one.

    Args:
        a, b: features, shapes (N, d) and (M, d); paired: row i of both from seed i, so N = M.
        metric: of features, `lambda x: frechet_distance(gaussian_stats(x), reference)` say.
        resamples: calls of `metric` for each of the two, at least 2.
        confidence: of the interval, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: features that do not fit together or are not finite, pairs of other lengths, or
            bad settings.
    """
    check_features(a, b)
    if paired and len(a) != len(b):
        raise ValueError(
            f"need as many images of either side to compare them seed by seed, got {len(a)} and "
            f"{len(b)} (params.yaml: generate.images)"
        )
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            "need 2 or more resamples and a confidence in (0, 1), got "
            f"{resamples} and {confidence} (params.yaml: metric.bootstrap)"
        )
    rng = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(len(a), size=len(a))
        others = rows if paired else rng.integers(len(b), size=len(b))
        differences[i] = metric(a[rows]) - metric(b[others])
    ours, theirs = metric(a), metric(b)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = ours - theirs + np.quantile(differences - differences.mean(), ends)
    return Difference(
        a=ours,
        b=theirs,
        value=ours - theirs,
        low=float(low),
        high=float(high),
        confidence=confidence,
        error=float(differences.std(ddof=1)),
        resamples=resamples,
    )


def bootstrap_error(
    features: Features, metric: Callable[[Features], float], resamples: int, seed: int = 0
) -> float:
    """Standard deviation of a metric over resamples of its images, drawn with return.

    What the seeds contribute: how far the value of another range of as many seeds would stray.

    Raises:
        ValueError: fewer than 2 resamples.
    """
    if resamples < 2:
        raise ValueError(
            f"need at least 2 resamples, got {resamples} (params.yaml: metric.bootstrap.resamples)"
        )
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(features), size=len(features)) for _ in range(resamples))
    return float(np.std([metric(features[rows]) for rows in draws], ddof=1))
