"""All metrics of a set of images from one pass over its features, and their spread.

Most metrics depend on the number of images. So each range of seeds is scored separately, and its
values are comparable with those of any range of equal size.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.distributed import Rank
from fewstep.files import sha256_file
from fewstep.metrics.bootstrap import bootstrap_error
from fewstep.metrics.classwise import class_distances
from fewstep.metrics.cmmd import cmmd
from fewstep.metrics.features import FeatureExtractor, Outputs
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.metrics.inception_score import inception_score
from fewstep.metrics.kid import kid
from fewstep.metrics.manifold import manifold
from fewstep.metrics.memorisation import memorisation
from fewstep.metrics.neighbours import Device
from fewstep.metrics.reference import Reference, floor_images, load_reference
from fewstep.params import Metric, Params, digest, plain
from fewstep.paths import STATS

SHOWN = 10  # samples, each of another class, whose nearest training images are recorded


@dataclass
class Scores:
    """Of one range of images: values by metric, their errors if known, and the details."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, tuple[float, str]] = field(default_factory=dict)
    classes: dict[int, float] = field(default_factory=dict)
    neighbours: list[dict[str, Any]] = field(default_factory=list)


def metric_names(label: str) -> dict[str, str]:
    """Names of metrics by the label of the features; published names need published weights."""
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
    """All metrics in the settings, for one range of images.

    Args:
        outputs: of the feature network.
        labels: classes of the images, (N,).
        label: the name of the distance on these features.
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
        # as many reals as fakes, because the four metrics depend on both numbers
        balls = manifold(real[: len(features)], features, s.k, s.density_k, device)
        found.values.update(vars(balls))
    if settings.memorisation is not None:
        _memorisation(features, labels, reference, settings, device, found)
    if (s := settings.bootstrap) is not None:
        found.errors[label] = bootstrap_error(features, distance, s.resamples), "resamples"
    # a class with a single image has no covariance, and small data may have few of some class
    drawn, theirs = np.bincount(labels), np.bincount(real_labels, minlength=labels.max() + 1)
    if min(min(drawn[c], theirs[c]) for c in np.unique(labels)) > 1:
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
    _, first = np.unique(labels[nearest], return_index=True)  # the nearest sample of each class
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
    """By metric: mean over the ranges, a standard deviation, and its kind (`std_of`).

    With several ranges, `std` is the spread of their values, so of one range and not of the mean
    (`ranges`). With one, it is the metric's own error (`resamples` of the images, `subsets`,
    `splits`), or None.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in ranges[0].values:
        values = [r.values[name] for r in ranges]
        std, of = ranges[0].errors.get(name, (None, None))
        if len(values) > 1:
            std, of = float(np.std(values, ddof=1)), "ranges"
        mean = float(np.mean(values))
        summary[name] = {"value": mean, "std": std, "std_of": of, "values": values}
    return summary


def noted(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `work`, and the texts of its warnings, which are also raised again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    notes = list(dict.fromkeys(str(w.message) for w in caught))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return result, notes


def score_ranges(
    params: Params, extractor: FeatureExtractor, outputs: Outputs, labels: np.ndarray, rank: Rank
) -> list[Scores]:
    """The scores of each seed range."""
    reference, size, settings = load_reference(STATS), params.generate.images, params.metric
    ranges = [slice(start, start + size) for start in range(0, len(labels), size)]
    if len(ranges) > 1:  # their spread replaces the bootstrap, which is the slowest metric
        settings = replace(settings, bootstrap=None)
    return [
        score(
            {name: rows[part] for name, rows in outputs.items()},
            labels[part],
            reference,
            extractor.label,
            settings,
            rank.device,
        )
        for part in ranges
    ]


def summary(
    params: Params,
    extractor: FeatureExtractor,
    ranges: list[Scores],
    seeds: np.ndarray,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Means, spreads, details, and how they were measured; nothing depends on the machine."""
    metrics = spread(ranges)
    first = ranges[0].neighbours
    return {
        "metric": extractor.label,
        "value": metrics[extractor.label]["value"],
        "std": metrics[extractor.label]["std"],
        "metrics": metrics,
        "classes": {
            str(c): float(np.mean([r.classes[c] for r in ranges])) for c in ranges[0].classes
        },
        "neighbours": [{"seed": int(seeds[n["image"]]), **n} for n in first],
        "detector": about["detector"],
        "detector_sha256": extractor.sha256,
        "data_sha256": about["data_sha256"],
        "reference_file": about["reference_file"],
        "reference_sha256": sha256_file(STATS),
        "reference_images": about["reference_images"],
        "looked_through": about["looked_through"],
        "metric_params_sha256": digest(params.metric),
    }


def reference_summary(
    outputs: Outputs,
    labels: np.ndarray,
    reference: Reference,
    extractor: FeatureExtractor,
    params: Params,
    data_sha256: str,
    rank: Rank,
) -> dict[str, Any]:
    """The record of a reference, with its floor: the score of other real images against it.

    Args:
        outputs, labels: of the reference's images, then of those for the floor.
    """
    m, wanted = params.metric, params.metric.reference_images
    other = slice(wanted, wanted + floor_images(params, len(labels)))
    real = {name: rows[other] for name, rows in outputs.items()}
    without = replace(m, memorisation=None)  # they are training images, so all would be copies
    scores, notes = noted(
        lambda: score(real, labels[other], reference, extractor.label, without, rank.device)
    )
    return {
        "metric": extractor.label,
        "detector": {"features": m.features, "sha256": extractor.sha256},
        "detector_sha256": extractor.sha256,
        "data_sha256": data_sha256,
        "reference_file": plain(m.reference),
        "reference_images": wanted,
        "looked_through": len(reference.features) if m.memorisation else None,
        "settings": plain(m),
        "floor": {
            "value": scores.values[extractor.label],
            "images": len(labels[other]),
            "other_images": None if m.reference else wanted,
            "metrics": spread([scores]),
            "classes": {str(c): value for c, value in scores.classes.items()},
        },
        "notes": notes,
    }
