"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193), the network of FD-DINOv2 (Stein et al. 2023,
arXiv:2306.04675): images as EDM2 (Karras et al. 2024, arXiv:2312.02696) brings them to it."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.metrics.vit import Vit, normalise, vit_of
from fewstep.metrics.weights import read_weights

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
RESOLUTION = 224
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Dinov2(nn.Module):
    """uint8 images to the class token."""

    def __init__(self, vit: Vit) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images, uint8, shape (B, 1 or 3, H, W): (B, width)."""
        return {"features": self.vit(normalise(images, RESOLUTION, MEAN, STD, antialias=True))}


def fit_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings of another number of patches, as DINOv2 fits them.

    Bicubic, with the scale of 0.1 patches more than there are: the authors' guard against
    rounding, which moves the samples and so belongs to the published features.

    Args:
        positions: the class token's, then those of a square of patches, (1, 1 + n * n, width).
        side: patches along a side wanted.

    Returns:
        Shape (1, 1 + side * side, width).
    """
    trained = round((positions.shape[1] - 1) ** 0.5)
    if side == trained:
        return positions
    square = positions[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / trained
    fitted = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], fitted.flatten(2).transpose(1, 2)], 1)


def load_dinov2(path: Path, sha256: str) -> Dinov2:
    """The network in a file of Meta's, of size S, B or L, without registers; in eval mode.

    Raises:
        ValueError: no such file, another sha256, a pickle, or the weights of another network.
    """
    state = read_weights(path, sha256, URL, "metric.weights")
    state.pop("mask_token", None)  # for training
    try:
        patch = state["patch_embed.proj.weight"].shape[-1]
        state["pos_embed"] = fit_positions(state["pos_embed"], RESOLUTION // patch)
        return Dinov2(vit_of(state))
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"need the weights of {URL}, got other names or shapes in {path} "
            "(params.yaml: metric.weights)"
        ) from error
