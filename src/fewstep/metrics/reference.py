"""What samples are compared with: features of real images, and the network behind them."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.arrays import save_arrays
from fewstep.data.lmdb import ImageDataset
from fewstep.data.order import batch_indices
from fewstep.distributed import Rank
from fewstep.download import CACHE, fetch
from fewstep.metrics.features import FeatureExtractor, Outputs, load_features
from fewstep.metrics.frechet import GaussianStats, gaussian_stats
from fewstep.metrics.memorisation import real_spacing
from fewstep.metrics.published import published_stats
from fewstep.params import Metric, Params
from fewstep.paths import DATA

KEPT = 50_000  # features stored, at most: the other metrics need them, Fréchet only statistics


@dataclass(frozen=True)
class Reference:
    """Real images, as the metrics need them.

    Args:
        stats, spatial: of all reference images; spatial if the network has such features.
        features: (M, d), of the first `kept` reference images, then of further training images.
        labels, places: their classes and their indices in the data set, (M,).
        real_distances: of real images to their nearest others among the M; empty if unused.
    """

    stats: GaussianStats
    spatial: GaussianStats | None
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    places: NDArray[np.int64]
    kept: int
    real_distances: NDArray[np.float64]


def real_images(dataset: ImageDataset, count: int) -> NDArray[np.int64]:
    """Indices of a reference's images, in a fixed order: those that follow are disjoint from it."""
    return batch_indices(0, count, len(dataset), seed=0)  # not params.seed: one reference for all


def feature_network(params: Params, device: torch.device) -> FeatureExtractor:
    """The network of params.metric, with its weights downloaded if necessary."""
    m = params.metric
    if m.weights is None:
        return load_features(m.features, device)
    file = fetch(m.weights.url, m.weights.sha256, CACHE, key="metric.weights")
    return load_features(m.features, device, file, m.weights.sha256)


def published_reference(params: Params, extractor: FeatureExtractor) -> GaussianStats | None:
    """The statistics of params.metric.reference, downloaded if necessary; or None.

    Raises:
        ValueError: another sha256, or statistics that do not fit the network.
    """
    if (r := params.metric.reference) is None:
        return None
    file = fetch(r.url, r.sha256, CACHE, key="metric.reference")
    return published_stats(file, extractor.dim)


def save_reference(path: Path, reference: Reference) -> None:
    arrays = {
        "mean": reference.stats.mean,
        "cov": reference.stats.cov,
        "count": np.int64(reference.stats.count),
        "features": reference.features,
        "labels": reference.labels,
        "places": reference.places,
        "kept": np.int64(reference.kept),
        "real_distances": reference.real_distances,
    }
    if reference.spatial is not None:
        arrays |= {"spatial_mean": reference.spatial.mean, "spatial_cov": reference.spatial.cov}
    save_arrays(path, arrays)


def load_reference(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            a = dict(arrays)
        count, spatial = int(a["count"]), None
        if "spatial_mean" in a:
            spatial = GaussianStats(a["spatial_mean"], a["spatial_cov"], count)
        rest = {name: a[name] for name in ("features", "labels", "places", "real_distances")}
        stats = GaussianStats(a["mean"], a["cov"], count)
        return Reference(stats=stats, spatial=spatial, kept=int(a["kept"]), **rest)
    except (KeyError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"need a reference written by `fewstep ref-stats` in {path}, got: {error}"
        ) from error


def floor_images(params: Params, images: int) -> int:
    """The number of real images for the floor, disjoint from the reference: as in a range.

    With a published reference, which may cover all the data, as many as are left will do.

    Raises:
        ValueError: the data have fewer.
    """
    m, wanted = params.metric, params.generate.images
    rest = min(wanted, images - m.reference_images) if m.reference else wanted
    if rest < 2 or m.reference_images + rest > images:
        raise ValueError(
            f"need {m.reference_images} + {max(rest, 2)} disjoint images, got {images} in {DATA} "
            "(params.yaml: metric.reference_images, generate.images)"
        )
    return rest


def looked_through(metric: Metric, images: int) -> int:
    """The number of training images that are searched for copies; 0 if memorisation is off.

    Raises:
        ValueError: the data have fewer.
    """
    wanted = metric.memorisation.images if metric.memorisation else None
    if (wanted or 0) > images:
        raise ValueError(
            f"need at most {images} images, the number in {DATA}, got {wanted} "
            "(params.yaml: metric.memorisation.images)"
        )
    return wanted or 0


def reference_of(
    outputs: Outputs,
    labels: np.ndarray,
    places: np.ndarray,
    params: Params,
    rank: Rank,
    published: GaussianStats | None = None,
) -> Reference:
    """The reference from features of real images, its own images first.

    Args:
        published: statistics that replace those of these images in the Fréchet distance.
    """
    m, wanted = params.metric, params.metric.reference_images
    kept = min(wanted, KEPT)
    known = looked_through(m, len(places)) or kept
    features, spatial = outputs["features"], outputs.get("spatial")
    spacing = np.empty(0)
    if m.memorisation is not None:
        spacing = real_spacing(features[:known], params.generate.images, rank.device)
    return Reference(
        published or gaussian_stats(features[:wanted]),
        None if spatial is None else gaussian_stats(spatial[:wanted]),
        features[:known],
        labels[:known].astype(np.int64),
        places[:known],
        kept,
        spacing,
    )
