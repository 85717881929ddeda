"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193), the network of FD-DINOv2 (Stein et al. 2023,
arXiv:2306.04675), with the preprocessing of EDM2 (Karras et al. 2024, arXiv:2312.02696)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.metrics.vit import Embedding, vit_of
from fewstep.metrics.weights import load_network

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
RESOLUTION = 224
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def fit_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for another number of patches, interpolated as DINOv2 does it.

    Bicubic, with the scale of 0.1 more patches than there are. The authors added this against
    rounding; it shifts the samples, so the published features depend on it.

    Args:
        positions: of the class token, then of a square of patches, (1, 1 + n * n, width).
        side: patches wanted along a side.

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


def load_dinov2(path: Path, sha256: str) -> Embedding:
    """The network in one of Meta's files, of size S, B or L, without registers.

    Raises:
        ValueError: as `load_network`.
    """

    def build(state: dict[str, Tensor]) -> Embedding:
        state.pop("mask_token", None)  # only for training
        patch = state["patch_embed.proj.weight"].shape[-1]
        state["pos_embed"] = fit_positions(state["pos_embed"], RESOLUTION // patch)
        return Embedding(vit_of(state), MEAN, STD, antialias=True)

    return load_network(path, sha256, URL, build)
