"""Nearest training images, and a share of near-duplicates that means what it says."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fewstep.metrics.memorisation import memorisation


def normal(rows: int, seed: int = 0, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def test_neighbours_are_those_of_the_distance_matrix() -> None:
    samples, training = normal(20), normal(50, seed=1)
    found = memorisation(samples, training, k=4)
    expected = cdist(samples, training)
    assert (found.indices == expected.argsort(axis=1)[:, :4]).all()
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :4], rtol=1e-10)


def test_real_distances_are_to_the_nearest_other_image() -> None:
    training = normal(30)
    expected = cdist(training, training) + np.diag([np.inf] * 30)
    found = memorisation(normal(40, seed=1), training)
    np.testing.assert_allclose(found.real_distances, expected.min(axis=1), rtol=1e-10)


def test_copies_are_found_at_distance_zero() -> None:
    training = normal(2000, dim=64) + 100
    copies = np.array([5, 1999, 700])
    samples = np.concatenate([training[copies], normal(297, seed=1, dim=64) + 100])
    found = memorisation(samples, training)
    assert (found.indices[:3, 0] == copies).all()
    assert (found.distances[:3, 0] == 0).all() and found.distances[3:].min() > 0
    assert found.share >= 0.01


def test_copies_count_even_where_the_data_repeat_themselves() -> None:
    training = np.concatenate([normal(100), normal(100)])  # every real distance is 0
    found = memorisation(np.concatenate([training[:20], normal(20, seed=1)]), training)
    assert found.threshold == 0 and found.share == 0.5


def test_share_of_new_images_is_the_expected_one() -> None:
    found = memorisation(normal(4000), normal(4000, seed=1), expected=0.05)
    assert found.share == pytest.approx(0.05, abs=0.015)
    half = np.concatenate([normal(2000, seed=1)[:2000] + 1e-4, normal(2000, seed=2)])
    copied = memorisation(half, normal(4000, seed=1), expected=0.05)
    assert copied.share == pytest.approx(0.5 + 0.5 * 0.05, abs=0.02)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"need 1 to 8 neighbours .* got 9 and 0.01 .*memorisation.k"
    ):
        memorisation(normal(3), normal(9), k=9)
    with pytest.raises(ValueError, match=r"got 3 and 1.0 .*memorisation.expected"):
        memorisation(normal(3), normal(9), expected=1.0)
