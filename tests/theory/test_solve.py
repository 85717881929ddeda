"""Solver steps on Gaussian data, whose probability-flow ODE has a closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import EDM, Gaussian, exact_flow
from fewstep.theory.solve import (
    Denoise,
    churn,
    ddim_step,
    euler_step,
    heun_step,
    inverse_ddim,
    posterior_step,
)

Step = Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]


def normal(seed: int, n: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=generator)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def global_error(step: Step, n: int) -> float:
    """Relative error at sigma_min after n - 1 steps from sigma_max."""
    sigmas = EDM.sigmas(n)
    x = start = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    with torch.no_grad():
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = step(Gaussian(), x, sigma, sigma_next)
    exact = exact_flow(start, sigmas[0], sigmas[-1])
    return abs(float(x / exact) - 1)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)])
def test_solver_converges_at_its_order(step: Step, order: int) -> None:
    coarse, fine = global_error(step, 65), global_error(step, 257)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_one_step_is_exact_where_the_denoiser_is_constant(step: Step) -> None:
    """With D = c the ODE's paths are the straight lines c + sigma n."""
    c, n, sigma, sigma_next = normal(0), normal(1), column(5.0), column(0.3)[0, 0, 0, 0]
    landed = step(lambda x, sigma: c, c + sigma * n, sigma, sigma_next)
    torch.testing.assert_close(landed, c + sigma_next * n)


@pytest.mark.parametrize(("step", "nfe"), [(euler_step, 1), (heun_step, 2)])
def test_step_costs_what_it_says(step: Step, nfe: int) -> None:
    denoise, sigmas = Gaussian(), EDM.sigmas(3)
    step(denoise, normal(0, 1), sigmas[0], sigmas[1])
    assert denoise.nfe == nfe


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_step_to_zero_is_the_denoiser_at_one_call(step: Step) -> None:
    denoise, x, sigma = Gaussian(), normal(0, 1), torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(step(denoise, x, sigma, 0 * sigma), denoise(x, sigma))
    assert denoise.nfe == 2  # one by the step, one by this test


def test_ddim_is_euler() -> None:
    x, denoise = normal(0), Gaussian()
    sigma, sigma_next = column(*[3.0] * 8), column(*torch.linspace(0, 2, 8).tolist())
    euler = euler_step(denoise, x, sigma, sigma_next)
    torch.testing.assert_close(ddim_step(x, denoise(x, sigma), sigma, sigma_next), euler)


def test_inverse_ddim_undoes_ddim() -> None:
    x, D_x = normal(0, 4), normal(1, 4)
    sigma, sigma_ref = column(80.0, 3.0, 0.1, 0.002), column(79.0, 1.0, 0.002, 0.0)
    x_ref = ddim_step(x, D_x, sigma, sigma_ref)
    torch.testing.assert_close(inverse_ddim(x, x_ref, sigma, sigma_ref), D_x, rtol=1e-9, atol=1e-11)


def test_ddim_undoes_inverse_ddim() -> None:
    x, x_ref = normal(0, 3), normal(1, 3)
    sigma, sigma_ref = column(80.0, 3.0, 0.1), column(35.0, 1.0, 0.0)
    D_x = inverse_ddim(x, x_ref, sigma, sigma_ref)
    torch.testing.assert_close(ddim_step(x, D_x, sigma, sigma_ref), x_ref)


def test_inverse_ddim_amplifies_an_error_by_the_stated_gain() -> None:
    x, x_ref, error = normal(0, 2), normal(1, 2), normal(2, 2)
    sigma, sigma_ref = column(35.4749, 3.0), column(34.99219, 1.0)
    off = inverse_ddim(x, x_ref + error, sigma, sigma_ref)
    gain = (off - inverse_ddim(x, x_ref, sigma, sigma_ref)) / error
    torch.testing.assert_close(gain, (1 / (1 - sigma_ref / sigma)).expand_as(gain))


@pytest.mark.parametrize(("sigma", "sigma_ref"), [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_inverse_ddim_refuses_what_cannot_be_inverted(sigma: float, sigma_ref: float) -> None:
    with pytest.raises(ValueError, match=r"need sigma > sigma_ref and sigma > 0"):
        inverse_ddim(normal(0, 1), normal(1, 1), column(sigma), column(sigma_ref))


def test_churn_raises_the_noise_to_the_new_sigma() -> None:
    sigma = torch.tensor(2.0, dtype=torch.float64)
    x, noise = torch.zeros(1, 1, 1, 1).double(), column(1.0)
    raised, sigma_hat = churn(x, sigma, 0.4, 1.0, noise)
    assert float(sigma_hat) == pytest.approx(2.8)
    assert float(raised) == pytest.approx((2.8**2 - 2.0**2) ** 0.5)
    still, same = churn(x, sigma, 0.0, 1.003, noise)
    assert float(still) == 0
    assert float(same) == 2


def test_the_posterior_of_gaussian_data_has_the_right_mean_and_variance() -> None:
    """Given x at sigma and exact clean images, x at sigma_next is distributed as by noising y."""
    generator = torch.Generator().manual_seed(0)
    y, n, fresh = torch.randn(3, 400_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    sigma, sigma_next = torch.tensor(2.0), torch.tensor(0.7)
    x = 0.5 * y + sigma * n
    x_next = posterior_step(x, 0.5 * y, sigma, sigma_next, fresh)
    assert float(x_next.var()) == pytest.approx(0.5**2 + 0.7**2, rel=0.01)
    assert float((x_next * x).mean()) == pytest.approx(0.5**2 + 0.7**2, rel=0.01), "Markov"
    assert float((x_next * y).mean()) == pytest.approx(0.5, rel=0.01)


def test_the_posterior_at_no_noise_is_the_clean_image() -> None:
    x, clean, n = torch.randn(3, 2, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(posterior_step(x, clean, torch.tensor(2.0), torch.tensor(0.0), n), clean)
