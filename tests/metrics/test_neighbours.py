"""Nearest neighbours in blocks against scipy's, in any shape of blocks."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fewstep.metrics import neighbours
from fewstep.metrics.neighbours import distance_blocks, nearest


@pytest.fixture(params=[4, 7, 4096], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", request.param)


def normal(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 1, (rows, 6)).astype(np.float32)


def test_blocks_together_are_the_distance_matrix() -> None:
    a, b = normal(23), normal(17, seed=1)
    whole = torch.full((23, 17), torch.nan, dtype=torch.float64)
    for rows, columns, distances in distance_blocks(a, b):
        whole[rows, columns] = distances
    np.testing.assert_allclose(whole.numpy(), cdist(a, b), rtol=1e-10)


@pytest.mark.parametrize("k", [1, 5, 9])
def test_nearest_are_those_of_the_sorted_distance_matrix(k: int) -> None:
    a, b = normal(23), normal(17, seed=1)
    distances, indices = nearest(a, b, k)
    expected = cdist(a, b)
    assert (indices == expected.argsort(axis=1)[:, :k]).all()
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :k], rtol=1e-10)


def test_what_is_skipped_is_nobodys_neighbour() -> None:
    a = normal(23)
    own = np.array([20, 3, 11])
    distances, indices = nearest(a[own], a, 4, skip=own)
    expected = cdist(a[own], a)
    expected[np.arange(3), own] = np.inf
    assert (indices == expected.argsort(axis=1)[:, :4]).all()
    assert np.isfinite(distances).all() and distances.min() > 0.1
