"""MMD and KID: closed forms, enumeration, direct sums, and an error that means what it says."""

from itertools import product
from math import comb

import numpy as np
import pytest
from numpy.typing import NDArray

from fewstep.metrics import mmd
from fewstep.metrics.kid import kid
from fewstep.metrics.mmd import Kernel, biased_mmd2, cubic_kernel, gaussian_kernel, unbiased_mmd2
from fidelity import fidelity_module

Matrix = NDArray[np.float64]


def normal(rows: int, dim: int = 8, mean: float = 0.0, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(mean, 1, (rows, dim))


def cubic(x: Matrix, y: Matrix) -> float:
    return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def direct_sum(x: Matrix, y: Matrix) -> float:
    """The estimator as it is written: three sums over pairs."""
    m, n = len(x), len(y)
    xx = sum(cubic(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(cubic(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(cubic(a, b) for a in x for b in y) / (m * n)
    return xx + yy - 2 * xy


def test_estimate_is_the_direct_sum_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(23), normal(17, mean=0.5, seed=1)
    assert unbiased_mmd2(x, y, cubic_kernel) == pytest.approx(direct_sum(x, y), rel=1e-12)
    monkeypatch.setattr(mmd, "ROWS", 5)
    assert unbiased_mmd2(x, y, cubic_kernel) == pytest.approx(direct_sum(x, y), rel=1e-12)


def test_estimate_has_no_bias_over_all_samples_of_two_small_distributions() -> None:
    """Every sample of 2 from three points against every sample of 3 from two points."""
    p, q = np.array([[0.0], [1.0], [4.0]]), np.array([[1.0], [-2.0]])
    estimates = [
        unbiased_mmd2(p[list(i)], q[list(j)], cubic_kernel)
        for i in product(range(3), repeat=2)
        for j in product(range(2), repeat=3)
    ]
    exact = biased_mmd2(p, q, cubic_kernel)  # the two distributions are their own samples
    moments = [(p**k).mean() - (q**k).mean() for k in range(4)]
    assert exact == pytest.approx(sum(comb(3, k) * m**2 for k, m in enumerate(moments)), rel=1e-12)
    assert np.mean(estimates) == pytest.approx(exact, rel=1e-12)


def test_kid_of_gaussians_is_the_closed_form() -> None:
    """In one dimension the cubic kernel compares three moments: sum_k C(3, k) (m_k - m'_k)^2."""
    x, y = normal(40_000, dim=1), 0.5 + 1.2 * normal(40_000, dim=1, seed=1)
    theirs = [1, 0.5, 0.5**2 + 1.2**2, 0.5**3 + 3 * 0.5 * 1.2**2]
    moments = zip([1, 0, 1, 0], theirs, strict=True)
    exact = sum(comb(3, k) * (a - b) ** 2 for k, (a, b) in enumerate(moments))
    result = kid(x, y, subsets=100)
    assert result.value == pytest.approx(exact, abs=3 * result.error)
    assert result.error < 0.05 * exact


def test_error_is_the_spread_over_data_sets() -> None:
    draws = (
        [normal(400, seed=s) for s in range(40)],
        [normal(400, 8, 0.5, s) for s in range(99, 139)],
    )
    results = [kid(x, y, subsets=60, subset_size=100) for x, y in zip(*draws, strict=True)]
    spread = np.std([r.value for r in results], ddof=1)
    assert np.mean([r.error for r in results]) == pytest.approx(spread, rel=0.35)


def test_error_at_no_distance_is_not_too_small() -> None:
    results = [kid(normal(400, seed=s), normal(400, seed=s + 99), 60, 100) for s in range(30)]
    values = np.array([r.value for r in results])
    assert values.min() < 0 < values.max()
    assert np.mean([r.error for r in results]) > values.std()
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))


def test_kid_follows_from_its_seed() -> None:
    x, y = normal(50), normal(60, seed=1)
    assert kid(x, y, 5, 20, seed=3) == kid(x, y, 5, 20, seed=3)
    assert kid(x, y, 5, 20, seed=3) != kid(x, y, 5, 20, seed=4)


def test_subsets_have_the_value_that_torch_fidelity_gives_them() -> None:
    x, y = normal(40), normal(40, mean=1, seed=1)
    kernel_mmd = fidelity_module("metric_kid").kernel_mmd
    theirs = kernel_mmd(x, y, kid_kernel="poly", kid_kernel_poly_coef0=1)
    assert unbiased_mmd2(x, y, cubic_kernel) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("kernel", [cubic_kernel, gaussian_kernel(2.0)])
def test_biased_discrepancy_is_zero_to_itself_and_positive_to_others(kernel: Kernel) -> None:
    x = normal(30)
    assert biased_mmd2(x, x, kernel) == pytest.approx(0, abs=1e-14)
    assert biased_mmd2(x, normal(30, seed=1), kernel) > 0


@pytest.mark.parametrize(
    ("rows", "subsets", "size"), [(30, 10, 30), (30, 10, 1), (30, 1, 10), (5, 10, 6)]
)
def test_subsets_that_do_not_fit_are_refused(rows: int, subsets: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"2 to {rows - 1} images, got {subsets} of {size} .*kid"):
        kid(normal(rows), normal(50), subsets, size)


def test_features_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(9, 8\) and \(9, 7\)"):
        kid(normal(9), normal(9, dim=7), 2, 3)
    bad = normal(9)
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="need finite features"):
        kid(normal(9), bad, 2, 3)
    with pytest.raises(ValueError, match="need at least 2 images on either side, got 9 and 1"):
        kid(normal(9), normal(1), 2, 3)
