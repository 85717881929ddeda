"""Do other people's weights run in the network of the params, and do they denoise as EDM's do?"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.interop.architecture import check_architecture
from fewstep.networks.denoiser import Denoiser, one_hot
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_weights
from fewstep.params import Params
from fewstep.theory.noise import per_image

LEVELS = 0.4, 1.0, 2.0  # noise levels, in units of sigma_data: where most of an image is decided
_SMALL = 32  # pixels: larger images cost a CPU seconds each


class Images(Protocol):
    """What is asked of a data set, such as `fewstep.data.lmdb.ImageDataset`."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Known:
    """Images that a network is asked to denoise.

    Attributes:
        images, labels: (B, C, H, W) in [-1, 1], and one-hot rows.
        what: how messages call them.
        own: they are of the data that the network is for; otherwise they are drawn shapes.
    """

    images: Tensor
    labels: Tensor
    what: str
    own: bool


def as_denoiser(
    weights: dict[str, Any], about: dict[str, Any], params: Params, origin: str
) -> Denoiser:
    """The network of the params with these weights, frozen, in eval mode.

    Raises:
        ValueError: the weights belong to another network; names the keys of params.yaml to edit.
    """
    check_architecture(about, params, origin)
    denoiser = build_denoiser(params)
    load_weights(denoiser, weights, origin)
    return denoiser.eval().requires_grad_(False)


@torch.no_grad()
def verify(
    weights: dict[str, Any],
    about: dict[str, Any],
    params: Params,
    origin: str,
    known: Known | None = None,
) -> str:
    """Load weights into the network of the params and let it denoise.

    Args:
        known: images to denoise; None draws some.

    Returns:
        What was found, for people. It begins with WARNING if the network does not denoise: the
        names of a state dict do not tell its preconditioning.

    Raises:
        ValueError: as `as_denoiser`.
        FloatingPointError: the network returns NaN or infinity.
    """
    denoiser, d, noise = as_denoiser(weights, about, params, origin), params.data, params.noise
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([noise.sigma_max, (noise.sigma_min * noise.sigma_max) ** 0.5])
    x = torch.randn(2, d.channels, d.resolution, d.resolution, generator=generator)
    labels = one_hot(torch.tensor([0, max(d.classes, 1) - 1]), d.classes) * torch.tensor(
        [[1.0], [0.0]]
    )
    D_x = denoiser(x * sigma[:, None, None, None], sigma, labels)
    bad = int((~D_x.isfinite()).sum())
    if D_x.shape != x.shape or bad:
        raise FloatingPointError(
            f"need finite images of {tuple(x.shape)}, got {tuple(D_x.shape)} with {bad} numbers "
            f"that are not finite from {origin} (params.yaml: precision, teacher.url)"
        )
    return denoising_report(denoiser, known or images_to_denoise(params))


def images_to_denoise(params: Params, dataset: Images | None = None) -> Known:
    """A few images of the data set, evenly spread; without one, drawn shapes."""
    d = params.data
    count = 16 if d.resolution <= _SMALL else 4
    if dataset is None:
        labels = torch.arange(count) % max(d.classes, 1)
        shapes = _shapes(count, d.resolution).expand(-1, d.channels, -1, -1).contiguous()
        return Known(shapes, one_hot(labels, d.classes), f"{count} drawn shapes", own=False)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
    images, labels = dataset.read(chosen)
    return Known(
        torch.from_numpy(images).float() / 127.5 - 1,
        one_hot(torch.from_numpy(labels), d.classes),
        f"{len(chosen)} images of {dataset.name}",
        own=True,
    )


def denoising_report(denoiser: Denoiser, known: Known) -> str:
    """How much of the noise a denoiser leaves, beside what it has to beat.

    The best multiple of the noisy image, y s^2 / (s^2 + sigma^2) with s^2 the images' mean square,
    needs no network and leaves s^2 / (s^2 + sigma^2) of the noise. The best denoiser of any data
    leaves no more of it, on images of those data. So a network that leaves more at some level is
    not a denoiser of them under EDM's preconditioning. Drawn shapes are nobody's data, so of those
    it has to leave more at most levels before anything is said.
    """
    sigmas = [level * denoiser.sigma_data for level in LEVELS]
    left = [remaining_noise(denoiser, known, sigma) for sigma in sigmas]
    power = float(known.images.square().mean())
    scaled = [power / (power + sigma**2) for sigma in sigmas]
    worse = [ours > theirs for ours, theirs in zip(left, scaled, strict=True)]
    levels = ", ".join(f"{sigma:.3g}" for sigma in sigmas)
    found = (
        f"of noise with sigma {levels} on {known.what} it leaves {_percent(left)} %; no network, "
        f"but the noisy images scaled, {_percent(scaled)} %"
    )
    if sum(worse) < (1 if known.own else 2):
        return f"denoising: {found}"
    return (
        f"WARNING: it does not denoise: {found}. These may be weights of another preconditioning "
        "(VP, VE, iDDPM), of other data, or of a student that knows few noise levels"
    )


def remaining_noise(denoiser: Denoiser, known: Known, sigma: float) -> float:
    """Mean squared error of D(y + n; sigma), in units of that of y + n."""
    y, generator = known.images, torch.Generator().manual_seed(0)
    n = sigma * torch.randn(y.shape, generator=generator)
    D_x = denoiser(y + n, torch.full((len(y),), sigma), known.labels)
    return float((D_x - y).square().mean()) / sigma**2


def _shapes(count: int, resolution: int) -> Tensor:
    """Bright discs with soft edges on black, (count, 1, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    at, (x, y, size) = torch.linspace(-1, 1, resolution), torch.rand(3, count, generator=generator)
    x, y, size = (per_image(values - 0.5) for values in (x, y, size))
    rows, columns = at.reshape(1, 1, -1, 1), at.reshape(1, 1, 1, -1)
    distance = ((columns - 0.4 * x) ** 2 + (rows - 0.4 * y) ** 2).sqrt()
    return 0.8 * torch.tanh(6 * (0.55 + 0.3 * size - distance))


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.3g}" for share in shares)
