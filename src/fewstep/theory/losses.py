"""Losses and weights: denoising, consistency, distribution matching, adversarial."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.theory.noise import per_image

T = TypeVar("T")

Weight = Callable[[Tensor, float], Tensor]

WEIGHTS: dict[str, Weight] = {
    "edm": lambda sigma, data: (sigma**2 + data**2) / (sigma * data) ** 2,
    "vlike": lambda sigma, data: _snr(sigma) + 1,
    "flat": lambda sigma, data: torch.ones_like(sigma),
    "uniform": lambda sigma, data: torch.ones_like(sigma),
    "snr": lambda sigma, data: _snr(sigma),
    "snr+1": lambda sigma, data: _snr(sigma) + 1,
    "karras": lambda sigma, data: (sigma**2 + data**2) / (sigma * data) ** 2,
    "sqrt_karras": lambda sigma, data: (sigma**2 + data**2).sqrt() / (sigma * data),
    "truncated-snr": lambda sigma, data: _snr(sigma).clamp(min=1),
}
"""By name; functions of sigma and sigma_data. The references use two names for some of them."""

DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "huber": lambda diff: F.huber_loss(diff, torch.zeros_like(diff), reduction="none", delta=1e-4),
    "l2": lambda diff: diff**2,
    "l2_root": lambda diff: _squared(diff).clamp(min=1e-12).sqrt(),
    "pseudo_huber": lambda diff: (_squared(diff) + 1e-8).sqrt() - 1e-4,
}
"""By name; functions of a difference of images (B, C, H, W).

The first two are elementwise, the others one number an image, (B, 1, 1, 1). Losses are summed over
elements, so their scales differ widely: Adam does not see that, but `grad_clip` does.
"""


def _snr(sigma: Tensor) -> Tensor:
    return 1 / (sigma**2 + 1e-20)


def _squared(diff: Tensor) -> Tensor:
    return (diff**2).sum(dim=(1, 2, 3), keepdim=True)


def denoising_loss(D_x: Tensor, y: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss lambda(sigma) (D_x - y)^2, elementwise; sigma is (B,) (EDM, Table 1)."""
    return per_image(loss_weight("edm", sigma, sigma_data)) * (D_x - y) ** 2


def loss_weight(kind: str, sigma: Tensor, sigma_data: float) -> Tensor:
    """Weight of a loss at sigma; has the shape of sigma.

    Raises:
        ValueError: unknown kind.
    """
    return _of(WEIGHTS, kind, "weight")(sigma, sigma_data)


def distance(kind: str, diff: Tensor) -> Tensor:
    """Distance between prediction and target, given their difference (B, C, H, W).

    Raises:
        ValueError: unknown kind.
    """
    return _of(DISTANCES, kind, "distance")(diff)


def _of(table: dict[str, T], kind: str, key: str) -> T:
    if kind not in table:
        raise ValueError(f"need a {key} of {', '.join(table)}, got {kind!r} (settings.{key})")
    return table[kind]


def distribution_matching(
    x: Tensor, D_teacher: Tensor, D_fake: Tensor, epsilon: float = 0.0, nan_to_num: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss whose gradient moves x from the fake to the teacher's distribution (DMD2, eq. 2).

    Args:
        x: generated images (B, C, H, W), with gradient.
        D_teacher, D_fake: both denoisers' outputs for the same noised copy of x.
        epsilon: added to the weight mean|x - D_teacher|; the reference adds nothing.
        nan_to_num: as in the reference, 0/0 becomes 0 and infinity the largest finite number.

    Returns:
        The scalar loss and the direction (D_fake - D_teacher) / weight, (B, C, H, W), which is the
        loss's gradient times the number of elements.
    """
    with torch.no_grad():
        weight = (x - D_teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + epsilon
        direction = (D_fake - D_teacher) / weight
        direction = direction.nan_to_num() if nan_to_num else direction
    # the target is detached, so the gradient is exactly the direction over the number of elements
    return 0.5 * F.mse_loss(x, (x - direction).detach()), direction


def fake_score_loss(D_x: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Denoising loss of the fake score on generated images, averaged over each image, (B,).

    The weight 1/sigma^2 + 1/sigma_data^2 equals EDM's lambda; rounding follows DMD2's code.
    """
    weight = per_image(sigma**-2 + 1 / sigma_data**2)
    return (weight * (D_x - x) ** 2).flatten(1).mean(dim=1)


def gan_student_loss(logits_fake: Tensor) -> Tensor:
    """Non-saturating loss of the student (Goodfellow et al. 2014): mean softplus(-logit)."""
    return F.softplus(-logits_fake).mean()


def gan_critic_loss(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """Loss of the discriminator: mean softplus(fake logit) + mean softplus(-real logit)."""
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()
