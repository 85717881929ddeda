"""Samplers: from noise to images with a denoiser; every image depends on its own seed alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fewstep.denoiser import ConditionalDenoise
from fewstep.distributed import to_device
from fewstep.noise import karras_sigmas, with_zero
from fewstep.solve import churn, ddim_step, euler_step, heun_step

Noise = Callable[[], Tensor]
"""Gives the next standard normal images of a batch, shape (B, C, H, W), float32."""

CPU = torch.device("cpu")
SAMPLERS = ("heun", "euler", "ddim", "renoise", "churn")


class SeededNoise:
    """A generator a seed: latents first, then the label, then whatever a sampler draws.

    The numbers of an image depend on its seed alone, not on batch, rank or device.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device = CPU,
    ) -> None:
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """Drawn on the CPU, given on the device."""
        drawn = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return to_device(drawn, self.device)

    def labels(self, classes: int) -> Tensor:
        """A class index a seed, uniform, int64, shape (B,), on the CPU."""
        draws = [torch.randint(classes, (1,), generator=g) for g in self.generators]
        return torch.cat(draws)


def nfe(sampler: str, steps: int, guidance_scale: float = 1.0) -> int:
    """Network calls per image: Heun's last step is Euler; guidance doubles all."""
    calls = 2 * steps - 1 if sampler in ("heun", "churn") else steps
    return calls * (1 if guidance_scale == 1 else 2)


def sample_edm(
    denoise: ConditionalDenoise,
    latents: Tensor,
    labels: Tensor,
    sigmas: Tensor,
    heun: bool = True,
    noise: Noise | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """EDM Algorithm 2 (deterministic where S_churn is 0), float64 state.

    Args:
        latents: standard normal, (B, C, H, W).
        labels: one-hot (B, classes).
        sigmas: descending, ending in 0, (steps + 1,).
        heun: second-order correction; else Euler.
        noise: draws for the churn, one a step.

    Raises:
        ValueError: S_churn > 0 without noise.
    """
    if S_churn > 0 and noise is None:
        raise ValueError("need noise where S_churn > 0, got none")
    step = heun_step if heun else euler_step
    bound = partial(_conditioned, denoise, labels)
    sigmas = sigmas.to("cpu", torch.float64)  # a GPU would have to be waited for to look at them
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        if noise is not None and S_churn > 0:
            n = noise().to(x)
            inside = S_min <= float(sigma) <= S_max
            gamma = min(S_churn / (len(sigmas) - 1), 2**0.5 - 1) if inside else 0.0
            x, sigma = churn(x, sigma, gamma, S_noise, n)
        x = step(bound, x, sigma, sigma_next)
    return x


def sample_ddim(
    denoise: ConditionalDenoise, latents: Tensor, labels: Tensor, sigmas: Tensor
) -> Tensor:
    """Deterministic DDIM along sigmas (steps + 1,), the last of which is 0; float64 state."""
    sigmas = sigmas.to("cpu", torch.float64)
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = ddim_step(x, denoise(x, sigma, labels).to(x), sigma, sigma_next)
    return x


def sample_renoise(
    denoise: ConditionalDenoise, latents: Tensor, labels: Tensor, sigmas: Tensor, noise: Noise
) -> Tensor:
    """Denoise fully, add fresh noise of the next sigma, repeat (DMD2, section 4.4).

    sigmas (steps,) end at the last one denoised, not at 0.
    """
    sigmas = sigmas.to("cpu", torch.float64)
    x = latents.to(torch.float64) * sigmas[0]
    for i, sigma in enumerate(sigmas):
        if i > 0:
            x = x + sigma * noise().to(x)
        x = denoise(x, sigma, labels).to(x)
    return x


def sample(
    sampler: str,
    denoise: ConditionalDenoise,
    noise: SeededNoise,
    latents: Tensor,
    labels: Tensor,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    churn: Mapping[str, float] | None = None,
) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], float64, by the sampler of that name.

    Raises:
        ValueError: unknown sampler.
    """
    sigmas = karras_sigmas(steps, sigma_min, sigma_max, rho)
    if sampler == "renoise":
        return sample_renoise(denoise, latents, labels, sigmas, noise)
    sigmas = with_zero(sigmas)
    if sampler == "ddim":
        return sample_ddim(denoise, latents, labels, sigmas)
    if sampler in ("heun", "euler"):
        return sample_edm(denoise, latents, labels, sigmas, heun=sampler == "heun")
    if sampler == "churn":
        return sample_edm(denoise, latents, labels, sigmas, True, noise, **(churn or {}))
    raise ValueError(
        f"need a sampler of {', '.join(SAMPLERS)}, got {sampler!r} (params.yaml: rows)"
    )


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded: (x 127.5 + 128) clipped and truncated, as EDM does."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def _conditioned(denoise: ConditionalDenoise, labels: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    return denoise(x, sigma, labels).to(x.dtype)
