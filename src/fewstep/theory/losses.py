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


def uncertainty_loss(loss: Tensor, log_variance: Tensor) -> Tensor:
    """loss / e^u + u (EDM2, eqs. 14-16), elementwise: least at u = ln E[loss].

    Then every noise level contributes gradients of the same size, whatever its loss.
    """
    return loss * (-log_variance).exp() + log_variance


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
    x: Tensor,
    D_teacher: Tensor,
    D_fake: Tensor,
    epsilon: float = 0.0,
    nan_to_num: bool = False,
    factor: Tensor | float = 1.0,
    weighted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss whose gradient moves x from the fake to the teacher's distribution (DMD2, eq. 2).

    Args:
        x: generated images (B, C, H, W), with gradient.
        D_teacher, D_fake: both denoisers' outputs for the same noised copy of x.
        epsilon: added to the weight mean|x - D_teacher|; the reference adds nothing.
        nan_to_num: as in the reference, 0/0 becomes 0 and infinity the largest finite number.
        factor: of each image's direction, (B, 1, 1, 1).
        weighted: divide by the weight.

    Returns:
        The scalar loss and the direction (D_fake - D_teacher) / weight, (B, C, H, W), which is the
        loss's gradient times the number of elements.
    """
    with torch.no_grad():
        weight = (x - D_teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + epsilon
        direction = factor * (D_fake - D_teacher) / (weight if weighted else 1.0)
        direction = direction.nan_to_num() if nan_to_num else direction
    # the target is detached, so the gradient is exactly the direction over the number of elements
    return 0.5 * F.mse_loss(x, (x - direction).detach()), direction


def score_identity(
    x: Tensor, D_teacher: Tensor, D_fake: Tensor, alpha: float, epsilon: float = 0.0
) -> Tensor:
    """The loss of score identity distillation (Zhou et al. 2024, eq. 23), averaged over elements.

    <D_T - D_F, (D_T - x) - alpha (D_T - D_F)> / mean|x - D_T|. Its gradient reaches x directly and
    through both denoisers, which must have been called with gradient; the weight has none.

    Args:
        x, D_teacher, D_fake: as for `distribution_matching`.
        alpha: 1.2 in the paper, and 1 beside an adversarial loss.
    """
    gap = D_teacher - D_fake
    weight = (x - D_teacher).abs().mean(dim=(1, 2, 3), keepdim=True).detach() + epsilon
    return (gap * ((D_teacher - x) - alpha * gap) / weight).mean()


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1 + r),
}
"""By name, the factor of the matching direction at density ratio r (Xu et al. 2025, Table 1)."""

RATIO_RANGE = 0.1, 20.0  # to which f-distill clips the density ratio
RATIO_BINS = 10  # ranges of noise levels over which the factors have mean 1


def divergence_factor(kind: str, logits: Tensor, place: Tensor) -> Tensor:
    """Factor of each image's matching direction, for a divergence other than reverse KL, (B,).

    Args:
        kind: a key of DIVERGENCES.
        logits: the discriminator's for the noised images, (B,); exp of it estimates the ratio of
            real to generated density.
        place: of the noise level in the grid, in [0, 1), (B,). Factors are divided by their mean
            over the images in the same tenth of the grid.
    """
    factor = DIVERGENCES[kind](logits.exp().clamp(*RATIO_RANGE))
    member = F.one_hot((place * RATIO_BINS).long(), RATIO_BINS).to(factor)
    mean = (member * factor[:, None]).sum(dim=0) / member.sum(dim=0).clamp(min=1)
    return factor / (member @ mean)


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
