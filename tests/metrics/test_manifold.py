"""Precision, recall, density, coverage: brute force, closed forms, the extremes, a library."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fewstep.metrics import neighbours
from fewstep.metrics.manifold import Manifold, manifold, recall
from fidelity import fidelity_module


def normal(rows: int, mean: float = 0.0, seed: int = 0, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (rows, dim)).astype(np.float32)


def brute_force(real: np.ndarray, fake: np.ndarray, k: int, density_k: int) -> Manifold:
    """By counting, one pair after the other."""

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.square(x.astype(np.float64) - y).sum()))

    def radius(centre: int, among: np.ndarray, k: int) -> float:
        others = [distance(among[centre], x) for i, x in enumerate(among) if i != centre]
        return sorted(others)[k - 1]

    def within(x: np.ndarray, centres: np.ndarray, k: int) -> list[bool]:
        return [distance(x, c) <= radius(i, centres, k) for i, c in enumerate(centres)]

    balls = np.array([within(x, real, density_k) for x in fake])
    return Manifold(
        precision=sum(any(within(x, real, k)) for x in fake) / len(fake),
        recall=sum(any(within(x, fake, k)) for x in real) / len(real),
        density=float(balls.sum()) / (density_k * len(fake)),
        coverage=float(balls.any(axis=0).mean()),
    )


@pytest.mark.parametrize("block", [6, 4096])
@pytest.mark.parametrize(("k", "density_k"), [(3, 5), (1, 1), (6, 2)])
def test_scores_are_those_of_counting(
    block: int, k: int, density_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real, fake = normal(21), normal(17, mean=0.7, seed=1)
    ours = manifold(real, fake, k, density_k)
    assert ours == brute_force(real, fake, k, density_k)
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1 and 0 < ours.coverage < 1


@pytest.mark.parametrize("block", [6, 4096])
def test_recall_alone_is_that_of_all_four(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real, fake = normal(40), normal(17, mean=0.7, seed=1)
    assert 0 < recall(real, fake) == manifold(real, fake).recall < 1
    with pytest.raises(ValueError, match="need more than k = 3 images, got 3"):
        recall(real, fake[:3])


def test_points_on_the_edge_of_a_ball_count() -> None:
    real = np.array([[0.0], [1], [2], [10]])
    fake = np.array([[3.0], [20], [30], [40]])
    # radii of the nearest real neighbours: 1, 1, 1, 8; 3 lies on the edge of [1, 3] and of [2, 18]
    ours = manifold(real, fake, k=1, density_k=1)
    assert (ours.precision, ours.density, ours.coverage) == (0.25, 0.5, 0.5)
    assert ours == brute_force(real, fake, 1, 1)


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    real, fake = normal(150), normal(120, mean=0.8, seed=1)
    ours = manifold(real, fake)
    full = fidelity_module("metric_prc").calculate_precision_recall_full
    precision, recall = full(torch.from_numpy(fake), torch.from_numpy(real), 3)
    assert (ours.precision, ours.recall) == (pytest.approx(precision), pytest.approx(recall))


def test_equal_distributions_have_the_expected_density_and_coverage() -> None:
    """Naeem et al. 2020, section 3.3: density 1, coverage 1 - (n-1)...(n-k) / (n+m-1)...(n+m-k)."""
    n, m, k = 60, 40, 5
    scores = [manifold(normal(n, seed=s), normal(m, seed=s + 999), 3, k) for s in range(60)]
    outside = np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    coverage, density = (np.array([getattr(s, f) for s in scores]) for f in ("coverage", "density"))
    error = np.sqrt(len(scores))
    assert coverage.mean() == pytest.approx(1 - outside, abs=4 * coverage.std() / error)
    assert density.mean() == pytest.approx(1, abs=4 * density.std() / error)


def test_the_same_images_score_full_marks_and_far_ones_none() -> None:
    real = normal(50)
    same = manifold(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert manifold(real, real + 100) == Manifold(0, 0, 0, 0)


@pytest.mark.parametrize("dim", [112, 768, 2048])
@pytest.mark.parametrize("repeats", [2, 3, 4, 6, 8])
def test_copies_of_data_that_repeat_themselves_score_full_marks(dim: int, repeats: int) -> None:
    """Equal distances come out unequal by rounding, and d = 2048 gave a precision of 0.85."""
    rng = np.random.default_rng(0)
    base = np.abs(rng.normal(0.4, 0.4, (240 // repeats, dim))).astype(np.float32)
    for scale in (1, 30):
        real = np.repeat(base, repeats, axis=0) * scale
        for fake in (real, real[rng.permutation(len(real))]):
            same = manifold(real, fake)
            assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
        part = real[rng.permutation(len(real))[:101]]  # another shape of matrices rounds otherwise
        assert manifold(real, part).precision == 1


def test_a_common_offset_changes_nothing() -> None:
    real, fake = (x.astype(float) for x in (normal(150, dim=9), normal(120, 0.3, 1, dim=9)))
    for offset in (1e3, 1e6):
        assert manifold(real + offset, fake + offset) == manifold(real, fake)


def test_a_collapsed_generator_has_finite_scores() -> None:
    real = normal(100)
    assert manifold(real, np.repeat(real[:1] + 100, 100, 0)) == Manifold(0, 0, 0, 0)
    inside = manifold(real, np.repeat(real[:1], 100, 0))
    assert (inside.precision, inside.recall) == (1, 0.01)


def test_one_mode_of_two_is_precise_and_recalls_half() -> None:
    real = np.concatenate([normal(60), normal(60, mean=50, seed=1)])
    fake = normal(120, seed=2)
    ours = manifold(real, fake)
    assert ours.precision > 0.8 and ours.recall < 0.51 and ours.coverage < 0.51
    assert cdist(fake, real[60:]).min() > 50


def test_too_few_images_and_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="need at least 6 images on either side, got 9 and 5"):
        manifold(normal(9), normal(5))
    with pytest.raises(
        ValueError, match=r"need k >= 1, got 0 and 5 \(params.yaml: metric.manifold"
    ):
        manifold(normal(9), normal(9), k=0)
