"""Any network of this architecture as a denoiser: one of our models or another checkpoint."""

from pathlib import Path
from typing import Any

import torch

from fewstep.interop.architecture import check_architecture
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.networks.denoiser import Denoiser, one_hot
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_weights
from fewstep.params import Params
from fewstep.paths import MODELS


def load(model: str, params: Params) -> Denoiser:
    """The denoiser called `model` in params.yaml, or in that file or folder, never executed.

    Raises:
        ValueError: there is no such model, or it is another network.
    """
    folder = MODELS / model
    path = folder if folder.is_dir() else Path(model)
    if not path.exists():
        known = ", ".join(["teacher", *params.students, *params.imports])
        raise ValueError(
            f"need a finished model ({known}) or the file or folder of a checkpoint, got {model!r}"
        )
    weights, about = import_checkpoint(path)
    return as_denoiser(weights, about, params, model)


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
def verify(weights: dict[str, Any], about: dict[str, Any], params: Params, origin: str) -> None:
    """Load weights into the network of the params and denoise two images, one without a label.

    Raises:
        ValueError: as `as_denoiser`.
        FloatingPointError: the network returns NaN or infinity.
    """
    denoiser, d, noise = as_denoiser(weights, about, params, origin), params.data, params.noise
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([noise.sigma_max, (noise.sigma_min * noise.sigma_max) ** 0.5])
    x = torch.randn(2, d.channels, d.resolution, d.resolution, generator=generator)
    labels = one_hot(torch.tensor([0, d.classes - 1]), d.classes) * torch.tensor([[1.0], [0.0]])
    D_x = denoiser(x * sigma[:, None, None, None], sigma, labels)
    bad = int((~D_x.isfinite()).sum())
    if D_x.shape != x.shape or bad:
        raise FloatingPointError(
            f"need finite images of {tuple(x.shape)}, got {tuple(D_x.shape)} with {bad} numbers "
            f"that are not finite from {origin} (params.yaml: precision, teacher.url)"
        )
