"""All metrics of a set of images from one pass over its features, and their spread.

Each range of seeds is scored by itself, so a value is comparable with that of any other range of
as many images.
"""

import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.distributed import Rank
from fewstep.files import atomic_path
from fewstep.metrics.classwise import class_distances
from fewstep.metrics.cmmd import cmmd
from fewstep.metrics.compare import bootstrap_error
from fewstep.metrics.features import (
    CHUNK,
    FeatureExtractor,
    extract_outputs,
    gather_features,
    rank_images,
)
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats
from fewstep.metrics.inception_score import inception_score
from fewstep.metrics.kid import kid
from fewstep.metrics.manifold import manifold
from fewstep.metrics.memorisation import memorisation
from fewstep.metrics.neighbours import Device
from fewstep.params import Metric
from fewstep.progress import progress

Outputs = Mapping[str, NDArray[np.float32]]
SHOWN = 10  # samples of a row, each of another class, whose nearest training images are kept
KEPT = 50_000  # real images that all but the Fréchet distance are computed with, at most


@dataclass(frozen=True)
class Reference:
    """Real images as the metrics need them.

    Args:
        stats, spatial: of all reference images; spatial where the network gives such features.
        features: (M, d), of the first `kept` reference images, then of further training images.
        labels, places: classes of those, and where they stand in the data set, (M,).
        kept: see above.
        real_distances: of real images to their nearest others among the M; empty without need.
    """

    stats: GaussianStats
    spatial: GaussianStats | None
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    places: NDArray[np.int64]
    kept: int
    real_distances: NDArray[np.float64]


@dataclass
class Scores:
    """Of one range of images: values by metric, what is known of their errors, and the details."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, tuple[float, str]] = field(default_factory=dict)
    classes: dict[int, float] = field(default_factory=dict)
    neighbours: list[dict[str, Any]] = field(default_factory=list)


def metric_names(label: str) -> dict[str, str]:
    """What metrics on features of that label are called; published names belong to the published
    Inception weights alone."""
    if label == "FID":
        return {"kernel": "KID", "spatial": "sFID", "score": "IS"}
    other = label.removeprefix("FD-")
    return {"kernel": f"KD-{other}", "spatial": f"sFD-{other}", "score": f"IS-{other}"}


def score(
    outputs: Outputs,
    labels: NDArray[np.integer],
    reference: Reference,
    label: str,
    settings: Metric,
    device: Device = "cpu",
) -> Scores:
    """All metrics that the settings ask for, of the images of one range.

    Args:
        outputs: of the feature network, "features" (N, d) among them.
        labels: classes of the images, (N,).
        label: what the distance on these features is called.
    """
    names, found, features = metric_names(label), Scores(), outputs["features"]
    real, real_labels = reference.features[: reference.kept], reference.labels[: reference.kept]

    def distance(rows: NDArray[np.floating]) -> float:
        return frechet_distance(gaussian_stats(rows), reference.stats)

    found.values[label] = distance(features)
    if reference.spatial is not None:
        stats = gaussian_stats(outputs["spatial"])
        found.values[names["spatial"]] = frechet_distance(stats, reference.spatial)
    if (s := settings.kid) is not None:
        result = kid(features, real, s.subsets, s.subset_size)
        found.values[names["kernel"]] = result.value
        found.errors[names["kernel"]] = result.error, "subsets"
    if label == "FD-CLIP":
        found.values["CMMD"] = cmmd(features, real)
    if (s := settings.inception_score) is not None:
        value, std = inception_score(outputs["logits"], s.splits)
        found.values[names["score"]] = value
        found.errors[names["score"]] = std, "splits"
    if (s := settings.manifold) is not None:
        balls = manifold(real[: len(features)], features, s.k, s.density_k, device)
        found.values.update(vars(balls))
    if settings.memorisation is not None:
        _memorisation(features, labels, reference, settings, device, found)
    if (s := settings.bootstrap) is not None:
        found.errors[label] = bootstrap_error(features, distance, s.resamples), "resamples"
    if min(np.bincount(labels)[np.unique(labels)]) > 1:
        found.classes = class_distances(features, labels, real, real_labels)
    return found


def _memorisation(
    features: NDArray[np.float32],
    labels: NDArray[np.integer],
    reference: Reference,
    settings: Metric,
    device: Device,
    found: Scores,
) -> None:
    assert (s := settings.memorisation) is not None
    m = memorisation(
        features, reference.features, s.k, s.expected, device, reference.real_distances
    )
    found.values["memorised"] = m.share
    nearest = np.argsort(m.distances[:, 0], kind="stable")
    _, first = np.unique(labels[nearest], return_index=True)  # the nearest of each class
    for image in nearest[np.sort(first)][:SHOWN].tolist():
        found.neighbours.append(
            {
                "image": image,
                "training": reference.places[m.indices[image]].tolist(),
                "distances": m.distances[image].tolist(),
                "near_duplicate": bool(m.distances[image, 0] <= m.threshold),
            }
        )


def spread(ranges: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """By metric: mean over the ranges, its standard deviation, and what that is of.

    Several ranges: `std` is that of their values, so of one range, not of the mean (`ranges`). One
    range: what it tells of itself (`resamples` of its images, `subsets`, `splits`), else None.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in ranges[0].values:
        values = [r.values[name] for r in ranges]
        std, of = ranges[0].errors.get(name, (None, None))
        if len(values) > 1:
            std, of = float(np.std(values, ddof=1)), "ranges"
        summary[name] = {"value": float(np.mean(values)), "std": std, "std_of": of}
        summary[name]["values"] = values
    return summary


def class_means(ranges: Sequence[Scores]) -> dict[str, float]:
    """Distance by class, mean over the ranges; class numbers as JSON writes keys."""
    return {str(c): float(np.mean([r.classes[c] for r in ranges])) for c in ranges[0].classes}


def noted(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `work`, and its warnings, each once; they are given on, too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    notes = list(dict.fromkeys(str(w.message) for w in caught))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return result, notes


# --- features over ranks ------------------------------------------------------------------------


def shared_outputs(
    extractor: FeatureExtractor,
    read: Callable[[range], NDArray[np.uint8]],
    count: int,
    rank: Rank,
    desc: str,
) -> dict[str, NDArray[np.float32]] | None:
    """All outputs of `count` images on the first rank, bit for bit whatever the ranks; else None.

    Args:
        read: gives the images (B, C, H, W) of a range of indices below `count`.
    """
    mine = rank_images(count, rank.index, rank.world)
    with progress(len(mine), desc, silent=not rank.first) as bar:
        images = (read(part) for part in _parts(mine))
        outputs = extract_outputs(extractor.outputs, images, bar.update, extractor.workers)
    return gather_features(outputs, rank)


def _parts(indices: range) -> Iterator[range]:
    return (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK))


# --- the reference as a file --------------------------------------------------------------------


def save_reference(path: Path, reference: Reference) -> None:
    """Write an .npz, atomically; the same reference gives the same bytes."""
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
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_reference(path: Path) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            a = {name: arrays[name] for name in arrays.files}
        count, spatial = int(a["count"]), None
        if "spatial_mean" in a:
            spatial = GaussianStats(a["spatial_mean"], a["spatial_cov"], count)
        return Reference(
            GaussianStats(a["mean"], a["cov"], count),
            spatial,
            a["features"],
            a["labels"],
            a["places"],
            int(a["kept"]),
            a["real_distances"],
        )
    except (KeyError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"need a reference of `fewstep ref-stats` in {path}, got: {error}"
        ) from error
