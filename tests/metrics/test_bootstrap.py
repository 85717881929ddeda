"""Paired bootstrap: the interval of theory, its coverage, what pairing is worth, refusals."""

import numpy as np
import pytest

from fewstep.metrics.bootstrap import bootstrap_error, compare
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats

REFERENCE = GaussianStats(np.zeros(3), np.eye(3), 10_000)


def first_mean(features: np.ndarray) -> float:
    return float(features[:, 0].mean())


def distance(features: np.ndarray) -> float:
    return frechet_distance(gaussian_stats(features), REFERENCE)


def pair(rows: int, shift: float, seed: int, own: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Two sets with common noise and noise of their own; the second is shifted."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, 3))
    a, b = (common + own * rng.normal(size=(rows, 3)) for _ in range(2))
    return a, b + shift


def test_interval_of_a_mean_is_that_of_the_paired_t_test() -> None:
    a, b = pair(400, shift=0.1, seed=0)
    found = compare(a, b, first_mean, resamples=4000, confidence=0.9)
    steps = a[:, 0] - b[:, 0]
    error = steps.std(ddof=1) / np.sqrt(len(steps))
    assert found.value == pytest.approx(steps.mean())
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(steps.mean() - 1.645 * error, abs=0.1 * error)
    assert found.high == pytest.approx(steps.mean() + 1.645 * error, abs=0.1 * error)


def test_interval_holds_the_true_difference_of_distances_as_often_as_it_says() -> None:
    """N(0, s^2 I) is at 3 (s - 1)^2 of the reference, plus the shift's square, plus what the
    number of images adds, which is nearly the same for both."""
    own, shift = 0.3, 0.15
    true = -3 * shift**2
    inside = []
    for seed in range(120):
        a, b = pair(250, shift, seed, own)
        found = compare(a, b, distance, resamples=80, confidence=0.9, seed=seed)
        inside.append(found.low <= true <= found.high)
    assert np.mean(inside) == pytest.approx(0.9, abs=0.09)


def test_pairs_tell_apart_what_separate_resamples_do_not() -> None:
    a, b = pair(300, shift=0.08, seed=1, own=0.1)
    paired, separate = (compare(a, b, first_mean, paired=p) for p in (True, False))
    assert paired.error < separate.error / 4
    assert paired.exceeds_noise and not separate.exceeds_noise


def test_equal_models_do_not_differ() -> None:
    a, _ = pair(50, 0, 2)
    found = compare(a, a, distance)
    assert (found.value, found.low, found.high, found.error) == (0, 0, 0, 0)
    assert not found.exceeds_noise


def test_result_follows_from_the_seed_and_swaps_with_the_models() -> None:
    a, b = pair(100, 0.1, 3)
    there, back = compare(a, b, distance, seed=5), compare(b, a, distance, seed=5)
    assert compare(a, b, distance, seed=5) == there
    assert compare(a, b, distance, seed=6) != there
    assert (back.value, back.a, back.b) == (-there.value, there.b, there.a)
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))


def test_pairs_of_other_lengths_and_bad_settings_are_refused() -> None:
    a, b = pair(20, 0, 0)
    with pytest.raises(ValueError, match="seed by seed, got 20 and 19"):
        compare(a, b[1:], first_mean)
    assert compare(a, b[1:], first_mean, paired=False).resamples == 200
    with pytest.raises(ValueError, match="got 1 and 0.95"):
        compare(a, b, first_mean, resamples=1)
    with pytest.raises(ValueError, match="got 200 and 1.0"):
        compare(a, b, first_mean, confidence=1.0)


def test_the_bootstrap_knows_the_error_of_a_mean() -> None:
    x = np.random.default_rng(0).normal(size=(400, 1)) * 3
    error = bootstrap_error(x, lambda rows: float(rows.mean()), resamples=500)
    assert error == pytest.approx(3 / 400**0.5, rel=0.15)
    with pytest.raises(ValueError, match="need 2 or more resamples .*, got 1 and"):
        bootstrap_error(x, lambda rows: 0.0, resamples=1)
