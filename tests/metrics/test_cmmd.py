"""CMMD: the formula, a closed form, digits where the kernel is nearly flat, refusals."""

import numpy as np
import pytest

from fewstep.metrics.cmmd import cmmd


def normal(rows: int, dim: int = 16, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (rows, dim)).astype(np.float32)


def test_score_is_the_formula_over_all_pairs() -> None:
    a, b = normal(12), normal(9, mean=1, seed=1)
    x, y = (
        f.astype(np.float64) / np.linalg.norm(f.astype(np.float64), axis=1)[:, None] for f in (a, b)
    )

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([np.exp(-np.square(p - q).sum() / 200) for p in x for q in y]))

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)


def test_two_points_score_by_their_distance_alone() -> None:
    a, b = np.tile([2.0, 0.0], (5, 1)), np.tile([0.0, 7.0], (4, 1))  # orthogonal: distance 2^1/2
    assert cmmd(a, b) == pytest.approx(2000 * (1 - np.exp(-2 / 200)), rel=1e-12)


def test_small_distances_keep_their_digits() -> None:
    angle = 1e-5
    a = np.tile([1.0, 0.0], (3, 1))
    b = np.tile([np.cos(angle), np.sin(angle)], (3, 1))
    assert cmmd(a, b) == pytest.approx(2000 * angle**2 / 200, rel=1e-4)


def test_length_of_embeddings_does_not_matter_and_none_is_refused() -> None:
    a, b = normal(12), normal(9, seed=1)
    assert cmmd(a * 8, b) == pytest.approx(cmmd(a, b), rel=1e-12)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="need embeddings of length above 0"):
        cmmd(a, b * 0)
