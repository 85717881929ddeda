"""Losses and weights: denoising, consistency, distribution matching, adversarial."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.noise import per_image

DISTANCES = ("huber", "l2", "l2_root", "pseudo_huber")
WEIGHTS = (
    "edm",
    "vlike",
    "flat",
    "uniform",
    "snr",
    "snr+1",
    "karras",
    "sqrt_karras",
    "truncated-snr",
)


def denoising_loss(D_x: Tensor, y: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's loss lambda(sigma) (D_x - y)^2, elementwise; sigma is (B,) (EDM, Table 1)."""
    return per_image(loss_weight("edm", sigma, sigma_data)) * (D_x - y) ** 2


def loss_weight(kind: str, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight of a loss at sigma, of sigma's shape. snr = 1 / sigma^2.

    Raises:
        ValueError: unknown kind.
    """
    snr = 1 / (sigma**2 + 1e-20)
    if kind in ("flat", "uniform"):
        return torch.ones_like(sigma)
    if kind in ("edm", "karras"):
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    if kind == "sqrt_karras":
        return (sigma**2 + sigma_data**2).sqrt() / (sigma * sigma_data)
    if kind in ("vlike", "snr+1"):
        return snr + 1
    if kind == "snr":
        return snr
    if kind == "truncated-snr":
        return snr.clamp(min=1)
    raise ValueError(f"need a weight of {', '.join(WEIGHTS)}, got {kind!r} (settings.weight)")


def distance(kind: str, diff: Tensor) -> Tensor:
    """Distance of images from their difference (B, C, H, W).

    Elementwise for `huber` (delta 1e-4) and `l2`; one number an image, (B, 1, 1, 1), for `l2_root`
    (Euclidean) and `pseudo_huber` (sqrt(|d|^2 + c^2) - c, c 1e-4).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "huber":
        return F.huber_loss(diff, torch.zeros_like(diff), reduction="none", delta=1e-4)
    if kind == "l2":
        return diff**2
    squared = (diff**2).sum(dim=(1, 2, 3), keepdim=True)
    if kind == "l2_root":
        return squared.clamp(min=1e-12).sqrt()
    if kind == "pseudo_huber":
        return (squared + 1e-8).sqrt() - 1e-4
    raise ValueError(f"need a distance of {', '.join(DISTANCES)}, got {kind!r} (settings.distance)")


def distribution_matching(
    x: Tensor, D_teacher: Tensor, D_fake: Tensor, epsilon: float = 0.0, nan_to_num: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss whose gradient moves x from the fake to the teacher's distribution (DMD2, eq. 2).

    Args:
        x: generated images (B, C, H, W), with gradient.
        D_teacher, D_fake: both denoisers' answers to one noised copy of x.
        epsilon: added to the weight mean|x - D_teacher|; the reference has none.
        nan_to_num: 0/0 moves nothing, and infinity is the largest number, as in the reference.

    Returns:
        The loss, a scalar, and the direction (B, C, H, W) that is its gradient times the number of
        elements: (D_fake - D_teacher) / weight.
    """
    with torch.no_grad():
        weight = (x - D_teacher).abs().mean(dim=(1, 2, 3), keepdim=True) + epsilon
        direction = (D_fake - D_teacher) / weight
        direction = direction.nan_to_num() if nan_to_num else direction
    return 0.5 * F.mse_loss(x, (x - direction).detach()), direction


def fake_score_loss(D_x: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Denoising loss of the fake score on generated images, the mean of each image, (B,).

    The weight is 1/sigma^2 + 1/sigma_data^2.
    """
    weight = per_image(sigma**-2 + 1 / sigma_data**2)
    return (weight * (D_x - x) ** 2).flatten(1).mean(dim=1)


def gan_student_loss(logits_fake: Tensor) -> Tensor:
    """Non-saturating loss of the student (Goodfellow et al. 2014): mean softplus(-logit)."""
    return F.softplus(-logits_fake).mean()


def gan_critic_loss(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """Loss of the discriminator: mean softplus(logit of fakes) + softplus(-logit of reals)."""
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()
