"""Feature networks by name: uint8 images in, one vector an image out."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.metrics import efficientnet


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network and what a result must say about it.

    Args:
        name: as in params.yaml: metric.features.
        label: what a distance on these features is called in tables ("FD-EffLite0").
        dim: length d of a feature vector.
        sha256: of the weights file.
        network: uint8 (B, C, H, W) -> float32 (B, d).
        device: where `network` lives.
    """

    name: str
    label: str
    dim: int
    sha256: str
    network: Callable[[Tensor], Tensor]
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Features of `images`, uint8, shape (N, C, H, W), C = 1 or 3: float32, shape (N, d).

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "need uint8 images of shape (N, 1 or 3, H, W), "
                f"got {images.dtype} of shape {tuple(images.shape)} (params.yaml: data.channels)"
            )
        with torch.inference_mode(), _exact_convolutions():
            return self.network(images.to(self.device)).float()


def _exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN in float32: TF32, its default, would make the score depend on the kind of GPU."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def _efficientnet_lite0(device: torch.device) -> FeatureExtractor:
    return FeatureExtractor(
        name="efficientnet-lite0",
        label="FD-EffLite0",  # never FID: that name belongs to Inception-2015
        dim=efficientnet.DIM,
        sha256=efficientnet.SHA256,
        network=efficientnet.load_efficientnet().to(device),
        device=device,
    )


FEATURES: dict[str, Callable[[torch.device], FeatureExtractor]] = {
    "efficientnet-lite0": _efficientnet_lite0,
}


def load_features(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The feature network called `name`, on `device`.

    Raises:
        ValueError: an unknown name, or weights that are missing or not the pinned ones.
    """
    if name not in FEATURES:
        known = ", ".join(FEATURES)
        raise ValueError(f"need features from {known}, got {name!r} (params.yaml: metric.features)")
    return FEATURES[name](torch.device(device))


def extract(
    extractor: Callable[[Tensor], Tensor],
    images: NDArray[np.uint8],
    batch: int,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """Features of many images, batch by batch; `batch` changes them by float32 rounding only.

    Args:
        extractor: uint8 (B, C, H, W) -> float32 (B, d), a `FeatureExtractor` say.
        images: uint8, shape (N, C, H, W), N >= 1.
        batch: images in one call.
        progress: called with the number of images of each finished batch; `bar.update` of tqdm.

    Returns:
        Shape (N, d).

    Raises:
        ValueError: no images, or batch < 1.
    """
    if len(images) == 0:
        raise ValueError("need at least 1 image, got 0 (params.yaml: generate.images)")
    if batch < 1:
        raise ValueError(f"need a batch of at least 1, got {batch} (params.yaml: generate.batch)")
    features: list[NDArray[np.float32]] = []
    for start in range(0, len(images), batch):
        chunk = torch.from_numpy(images[start : start + batch].copy())  # read-only memory maps
        features.append(extractor(chunk).cpu().numpy())
        if progress is not None:
            progress(len(chunk))
    return np.concatenate(features)
