"""`fewstep import FILE`: other people's checkpoint, verified -> FOLDER/model.safetensors."""

from pathlib import Path
from typing import Any

import torch

from fewstep.denoiser import Denoiser, one_hot
from fewstep.interop.architecture import check_architecture
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.models import MODELS, build_denoiser, load_weights, save_model
from fewstep.params import Params


def run(params: Params, file: str, out: str | None = None) -> None:
    weights, about = import_checkpoint(Path(file))
    print(describe(file, about), flush=True)
    verify(weights, about, params, file)
    folder = Path(out) if out else MODELS / Path(file).stem
    save_model(folder, weights, {**about, "name": folder.name})
    print(f"import: runs in the network of the params, is in {folder}")


def describe(file: str, about: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    network = {
        k: v for k, v in about.items() if k not in ("format", "source", "sha256", "left_out")
    }
    lines = [f"{key}: {value}" for key, value in network.items()]
    if left_out := about["left_out"]:
        more = f" and {len(left_out) - 6} more" if len(left_out) > 6 else ""
        lines.append(f"left out: {', '.join(left_out[:6])}{more}")
    return "\n  ".join([f"import: {file}: {about['format']}, sha256 {about['sha256']}", *lines])


def verify(weights: dict[str, Any], about: dict[str, Any], params: Params, origin: str) -> None:
    """Put weights into the network of the params and denoise two images, with and without label.

    Raises:
        ValueError: the network is another one; names the keys of params.yaml to edit.
        FloatingPointError: the network answers with NaN or infinity.
    """
    check_architecture(about, params, origin)
    denoiser = build_denoiser(params).eval().requires_grad_(False)
    load_weights(denoiser, weights, origin)
    check_forward(denoiser, params, origin)


@torch.no_grad()
def check_forward(denoiser: Denoiser, params: Params, origin: str) -> None:
    d, noise = params.data, params.noise
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
