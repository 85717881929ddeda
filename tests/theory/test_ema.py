"""Averages of weights: published decays, and what the profiles mean."""

import math

import numpy as np
import pytest
import torch

from fewstep.theory.ema import (
    half_life_beta,
    posthoc_coefficients,
    power_beta,
    std_to_exponent,
    update_average,
)

# --- half-life ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nimg", "beta"), [(204_800, 0.87055), (10_240_000, 0.99723), (157_696_000, 0.99982)]
)
def test_half_life_betas_are_the_published_ones(nimg: int, beta: float) -> None:
    assert half_life_beta(2048, nimg, 50_000, 0.05) == pytest.approx(beta, abs=5e-6)


def test_first_update_of_a_ramp_takes_the_weights_over() -> None:
    assert half_life_beta(64, 0, 8.0, 0.05) == 0


def test_half_of_the_average_is_left_after_the_half_life() -> None:
    assert half_life_beta(100, 0, 4.0) ** 40 == pytest.approx(0.5)
    assert half_life_beta(100, 10**9, 4.0, 0.05) == half_life_beta(100, 0, 4.0)


def test_half_life_is_a_share_of_the_images_seen_while_ramping() -> None:
    assert half_life_beta(100, 20_000, 1000.0, 0.05) == pytest.approx(0.5 ** (100 / 1000))


def test_no_half_life_keeps_no_average() -> None:
    assert half_life_beta(64, 1000, 0.0) == 0


# --- power function ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("std", "exponent"), [(0.05, 16.9722), (0.10, 6.9372), (0.15, 3.5579), (0.01, 96.995)]
)
def test_power_exponents_are_the_published_ones(std: float, exponent: float) -> None:
    assert std_to_exponent(std) == pytest.approx(exponent, rel=1e-5)


@pytest.mark.parametrize("std", [0.005, 0.05, 0.15, 0.25, 0.28])
def test_power_profile_has_the_std_it_is_named_after(std: float) -> None:
    """The std of t in [0, 1] under the density (gamma + 1) t^gamma."""
    g = std_to_exponent(std)
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.289, 0.5])
def test_power_exponent_refuses_stds_that_no_profile_has(std: float) -> None:
    with pytest.raises(ValueError, match=rf"need 0 < std < 0.289, got {std}"):
        std_to_exponent(std)


@pytest.mark.parametrize(("std", "beta"), [(0.05, 0.98217951), (0.10, 0.99209027)])
def test_power_betas_are_the_published_ones(std: float, beta: float) -> None:
    assert power_beta(2048, 2_048_000, std) == pytest.approx(beta, rel=1e-8)


def test_first_power_update_takes_the_weights_over() -> None:
    assert power_beta(64, 64, 0.1) == 0


def power_average(values: list[float], std: float) -> float:
    """The running average after one update of one image a value."""
    average = [torch.zeros(())]
    for n, value in enumerate(values, start=1):
        update_average(average, [torch.tensor(value)], power_beta(1, n, std))
    return float(average[0])


def test_power_average_weighs_times_by_their_power() -> None:
    """Of weights that grow as t, the average is the profile's mean, (gamma + 1) / (gamma + 2)."""
    g = std_to_exponent(0.1)
    average = power_average([t / 2000 for t in range(1, 2001)], 0.1)
    assert average == pytest.approx((g + 1) / (g + 2), abs=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999])
def test_averages_in_few_kernels_are_those_of_the_loop(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (4, 5), (), (2, 3, 3, 3)]
    weights, start = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    together, one_by_one = ([t.clone() for t in start] for _ in range(2))
    update_average(together, weights, beta, foreach=True)
    update_average(one_by_one, weights, beta, foreach=False)
    for a, b, w, before in zip(together, one_by_one, weights, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a, beta * before + (1 - beta) * w, rtol=1e-5, atol=1e-6)


# --- post-hoc ----------------------------------------------------------------------------------


def test_posthoc_coefficients_are_the_published_ones() -> None:
    X = posthoc_coefficients([4e6, 4e6, 8e6, 8e6], [0.05, 0.10, 0.05, 0.10], [8e6], [0.15])
    golden = [-0.014496, 0.050141, -0.340512, 1.304867]
    assert X.shape == (4, 1)
    assert X[:, 0].tolist() == pytest.approx(golden, abs=1e-6)


def test_posthoc_rebuilds_a_stored_snapshot_from_itself() -> None:
    times, stds = [4e6, 4e6, 8e6, 8e6], [0.05, 0.10, 0.05, 0.10]
    X = posthoc_coefficients(times, stds, times, stds)
    np.testing.assert_allclose(X, np.eye(4), atol=1e-9)


def test_posthoc_sum_of_snapshots_is_the_average_it_stands_for() -> None:
    times, stds, out = [400, 800, 1200, 1600, 2000], [0.05, 0.10], 0.07
    weights = [math.sin(t / 300) + t / 1000 for t in range(1, 2001)]
    stored = [(t, s) for t in times for s in stds]
    snapshots = [power_average(weights[:t], s) for t, s in stored]
    X = posthoc_coefficients([t for t, _ in stored], [s for _, s in stored], [2000], [out])
    assert X[:, 0].sum() == pytest.approx(1)
    assert float(X[:, 0] @ snapshots) == pytest.approx(power_average(weights, out), abs=0.015)
    assert min(abs(s - power_average(weights, out)) for s in snapshots[-2:]) > 0.1


# --- updates -----------------------------------------------------------------------------------


def test_update_moves_every_tensor_in_place_and_leaves_the_weights() -> None:
    average = [torch.zeros(2), torch.ones(1)]
    weights = [torch.ones(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    kept = list(average)
    update_average(average, weights, 0.75)
    assert kept[0].tolist() == [0.25, 0.25]
    assert kept[1].tolist() == [0.75]
    assert weights[0].tolist() == [1, 1]


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 5.0), (1.0, 1.0)])
def test_update_ends_are_exact(beta: float, expected: float) -> None:
    average = [torch.ones(3)]
    update_average(average, [torch.full((3,), 5.0)], beta)
    assert average[0].tolist() == [expected] * 3
