"""Single steps of ODE solvers, from sigma to a smaller sigma, as pure functions of the denoiser.

`denoise(x, sigma)` returns D(x; sigma). sigma and sigma_next are scalars or broadcast to x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
ConditionalDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, sigma, labels) -> D(x; sigma): x (B, C, H, W), sigma scalar or (B,), labels (B, classes)."""


def ddim_step(x: Tensor, D_x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """DDIM from sigma to sigma_next, given the denoised images D_x (Song et al. 2021, eq. 12).

    Equals an Euler step of the probability-flow ODE.
    """
    return D_x + (sigma_next / sigma) * (x - D_x)


def posterior_step(
    x: Tensor, D_x: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor
) -> Tensor:
    """Noised images at sigma_next, given those at sigma and the clean ones D_x.

    Draws from q(x_next | x, D_x), the Gaussian of mean r x + (1 - r) D_x and variance
    sigma_next^2 (1 - r), where r = (sigma_next / sigma)^2 (Ho et al. 2020, eqs. 6 and 7, for noise
    that is added without scaling). At sigma_next 0 that is D_x.

    Args:
        noise: standard normal, of the shape of x.
    """
    r = (sigma_next / sigma) ** 2
    return r * x + (1 - r) * D_x + sigma_next * (1 - r).sqrt() * noise


def inverse_ddim(x: Tensor, x_ref: Tensor, sigma: Tensor, sigma_ref: Tensor) -> Tensor:
    """The denoised images with which `ddim_step(x, ., sigma, sigma_ref)` lands on x_ref.

    An error in x_ref is amplified by 1 / (1 - sigma_ref / sigma).

    Raises:
        ValueError: sigma is 0 or equals sigma_ref; checked for tensors on the CPU only.
    """
    gap = sigma - sigma_ref
    on_cpu = gap.device.type == "cpu"  # elsewhere, looking would wait for the device
    if on_cpu and (bool((gap.abs() < 1e-12).any()) or bool((sigma == 0).any())):
        raise ValueError("need sigma > sigma_ref and sigma > 0 to invert DDIM, got equal or zero")
    return (sigma * x_ref - sigma_ref * x) / gap


def euler_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = (x - D(x; sigma)) / sigma. Costs 1 NFE."""
    return x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma


def heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step from sigma to sigma_next, EDM Algorithm 1; Euler when sigma_next is 0.

    Args:
        x: noisy images at sigma, shape (B, C, H, W).
        sigma, sigma_next: scalars, sigma > sigma_next >= 0.

    Returns:
        Images at sigma_next, shape (B, C, H, W). Costs 2 NFE, or 1 when sigma_next is 0.
    """
    slope = (x - denoise(x, sigma)) / sigma
    x_next = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return x_next
    slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2


def churn(
    x: Tensor, sigma: Tensor, gamma: float, s_noise: float, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Raise the noise from sigma to (1 + gamma) sigma (EDM, Algorithm 2, lines 4 to 6)."""
    sigma_hat = sigma + gamma * sigma
    return x + torch.sqrt(sigma_hat**2 - sigma**2) * s_noise * noise, sigma_hat
