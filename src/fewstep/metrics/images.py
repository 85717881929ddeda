"""The scores of a set of images, without a pipeline around it: `fewstep.score`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.budgets import HEADER, read_json, read_small
from fewstep.distributed import pick_device
from fewstep.files import sha256_file
from fewstep.metrics.features import FeatureExtractor, extract_outputs, load_features
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.metrics.reference import load_reference
from fewstep.quoting import quoted

FEATURES = "efficientnet-lite0"  # its weights come with an installed package


def score(
    images: NDArray[np.uint8],
    reference: str | os.PathLike[str] | NDArray[np.uint8],
    *,
    features: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """The Fréchet distance of images to real ones; lower is better.

    It depends on the number of images: compare scores of equally many. Of the images of a row it
    is, to the last bit, what `fewstep fid` reports for one seed range.

    Args:
        images: uint8 (N, H, W, C), 1 or 3 channels, as `Model.sample` returns them.
        reference: real images, uint8 (M, H, W, C); or the file that `fewstep ref-stats` wrote,
            artifacts/ref-stats.npz, with its .json beside it.
        features: the network; None: that of the reference file, else efficientnet-lite0.
        weights: the network's file, where no package brings it.
        device: auto, cpu or cuda.

    Returns:
        The distance by its name: FD-EffLite0, or FID for the published Inception weights.

    Raises:
        FileNotFoundError: no reference there.
        ValueError: images of another type or shape, fewer than two, or a reference of another
            feature network.
    """
    _check(images, "images")
    if isinstance(reference, np.ndarray):
        _check(reference, "the reference's images")
        extractor = _network(features or FEATURES, weights, device)
        stats = gaussian_stats(_features(extractor, reference))
    else:
        file = Path(reference)
        about = _about(file)
        extractor = _network(features or str(about.get("features", "")), weights, device)
        if about.get("sha256") != extractor.sha256:
            raise ValueError(
                f"need a reference for {extractor.name} with sha256 {extractor.sha256[:12]}, got "
                f"{quoted(about.get('features'))} {quoted(about.get('sha256'), 12)} in {file}"
            )
        stats = load_reference(file).stats
    return {extractor.label: frechet_distance(gaussian_stats(_features(extractor, images)), stats)}


def _check(images: NDArray[np.uint8], what: str) -> None:
    good = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)
    if not good or len(images) < 2:
        raise ValueError(
            f"need {what}: uint8, at least two, of shape (N, H, W, 1 or 3), got {images.dtype} of "
            f"shape {images.shape}"
        )


def _network(name: str, weights: str | os.PathLike[str] | None, device: str) -> FeatureExtractor:
    if weights is None:
        return load_features(name, pick_device(device))
    return load_features(name, pick_device(device), Path(weights), sha256_file(weights))


def _about(file: Path) -> dict[str, Any]:
    """Which network a reference's features are of."""
    for needed in (file, file.with_suffix(".json")):
        if not needed.is_file():
            raise FileNotFoundError(
                f"need {needed}, which `fewstep ref-stats` writes, got nothing there"
            )
    beside = file.with_suffix(".json")
    said = read_json(read_small(beside, HEADER, "JSON"), HEADER, str(beside))
    detector = said.get("detector") if isinstance(said, dict) else None
    if not isinstance(detector, dict):
        raise ValueError(f"need `detector` in {beside}, which `fewstep ref-stats` writes")
    return detector


def _features(extractor: FeatureExtractor, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    workers, chunk = extractor.workers, extractor.chunk
    found = extract_outputs(extractor.outputs, [channels_first], workers=workers, chunk=chunk)
    return found["features"]
