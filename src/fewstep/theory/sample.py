"""Samplers, which turn noise into images. An image depends only on its own seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.distributed import to_device
from fewstep.theory.solve import (
    ConditionalDenoise,
    churn,
    ddim_step,
    euler_step,
    heun_step,
    posterior_step,
)

Noise = Callable[[], Tensor]
"""Draws the next standard normal images of a batch, (B, C, H, W), float32."""

CPU = torch.device("cpu")


class SeededNoise:
    """One generator per seed, read in this order: latents, label, whatever the sampler draws.

    So the numbers of an image do not depend on batch, rank or device.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device = CPU
    ) -> None:
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """Draw on the CPU, whose stream is the same on every machine, and move to the device."""
        drawn = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return to_device(drawn, self.device)

    def labels(self, classes: int) -> Tensor:
        """A uniform class index for each seed, int64, (B,), on the CPU."""
        draws = [torch.randint(classes, (1,), generator=g) for g in self.generators]
        return torch.cat(draws)


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
    """EDM Algorithm 2 with a float64 state; deterministic when S_churn is 0.

    Args:
        latents: standard normal, (B, C, H, W).
        labels: one-hot (B, classes).
        sigmas: descending, ending in 0, (steps + 1,).
        heun: apply the second-order correction; else the steps are Euler's.
        noise: draws for the churn, one per step.

    Raises:
        ValueError: S_churn > 0 without noise.
    """
    if S_churn > 0 and noise is None:
        raise ValueError("need noise when S_churn > 0, got none")

    def conditioned(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma, labels).to(x.dtype)

    step = heun_step if heun else euler_step
    sigmas = sigmas.to("cpu", torch.float64)  # heun_step compares them: on a GPU that would wait
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        if noise is not None and S_churn > 0:
            n = noise().to(x)  # drawn at every step, so the stream does not depend on S_min, S_max
            inside = S_min <= float(sigma) <= S_max
            gamma = min(S_churn / (len(sigmas) - 1), 2**0.5 - 1) if inside else 0.0
            x, sigma = churn(x, sigma, gamma, S_noise, n)
        x = step(conditioned, x, sigma, sigma_next)
    return x


def sample_ddim(
    denoise: ConditionalDenoise, latents: Tensor, labels: Tensor, sigmas: Tensor
) -> Tensor:
    """Deterministic DDIM along sigmas (steps + 1,), which end in 0; float64 state."""
    sigmas = sigmas.to("cpu", torch.float64)
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = ddim_step(x, denoise(x, sigma, labels).to(x), sigma, sigma_next)
    return x


def sample_renoise(
    denoise: ConditionalDenoise, latents: Tensor, labels: Tensor, sigmas: Tensor, noise: Noise
) -> Tensor:
    """Denoise fully, add fresh noise at the next sigma, repeat (DMD2, section 4.4).

    sigmas (steps + 1,) end in 0, where no noise is added.
    """
    sigmas = sigmas.to("cpu", torch.float64)
    x = latents.to(torch.float64) * sigmas[0]
    for i, sigma in enumerate(sigmas[:-1]):
        if i > 0:
            x = x + sigma * noise().to(x)
        x = denoise(x, sigma, labels).to(x)
    return x


def sample_ancestral(
    denoise: ConditionalDenoise, latents: Tensor, labels: Tensor, sigmas: Tensor, noise: Noise
) -> Tensor:
    """Denoise fully, then draw the next sigma's images from the posterior of both; float64 state.

    The sampler of moment matching (Salimans et al. 2024, Algorithm 1). Unlike `sample_renoise`, a
    step keeps what it has learned: only a part of the noise is fresh. sigmas (steps + 1,) end in 0.
    """
    sigmas = sigmas.to("cpu", torch.float64)
    x = latents.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        D_x = denoise(x, sigma, labels).to(x)
        x = posterior_step(x, D_x, sigma, sigma_next, noise().to(x)) if sigma_next else D_x
    return x


@dataclass(frozen=True)
class Sampler:
    """A sampler and what it costs.

    Attributes:
        run: takes a denoiser, latents (B, C, H, W), labels, sigmas (steps + 1,) that end in 0, and
            noise if `draws`.
        order: network calls per step, except the last step, to 0, which is always a single call.
        draws: whether it draws noise after the latents.
    """

    run: Callable[..., Tensor]
    order: int
    draws: bool = False


SAMPLERS = {
    "heun": Sampler(sample_edm, 2),
    "euler": Sampler(partial(sample_edm, heun=False), 1),
    "ddim": Sampler(sample_ddim, 1),
    "renoise": Sampler(sample_renoise, 1, draws=True),
    "ancestral": Sampler(sample_ancestral, 1, draws=True),
    "churn": Sampler(sample_edm, 2, draws=True),
}


def nfe(sampler: str, steps: int, guidance_scale: float = 1.0) -> int:
    """Network calls per image; guidance doubles them."""
    calls = SAMPLERS[sampler].order * (steps - 1) + 1
    return calls * (1 if guidance_scale == 1 else 2)


def sample(
    sampler: str,
    denoise: ConditionalDenoise,
    noise: Noise,
    latents: Tensor,
    labels: Tensor,
    sigmas: Tensor,
    churn: Mapping[str, float] | None = None,
) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], float64, drawn by the named sampler.

    Args:
        sigmas: descending, ending in 0, (steps + 1,).
        churn: S_churn, S_min, S_max and S_noise, for the sampler `churn`.

    Raises:
        ValueError: unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(
            f"need a sampler of {', '.join(SAMPLERS)}, got {sampler!r} (params.yaml: rows)"
        )
    chosen = SAMPLERS[sampler]
    drawn = {"noise": noise} if chosen.draws else {}
    return chosen.run(denoise, latents, labels, sigmas, **drawn, **(churn or {}))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: (127.5 x + 128) clipped and truncated, that is rounded (EDM)."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
