"""`fewstep compare A B`: do two rows differ by more than their seeds?

A row is a name, of this checkout, or REVISION:NAME, of what DVC keeps of that revision of git
(a branch, a commit, an experiment).
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.distributed import Rank, pick_device
from fewstep.evaluate import feature_network
from fewstep.files import read_json
from fewstep.metrics.compare import Difference, compare
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.metrics.manifold import manifold
from fewstep.params import Bootstrap, Params
from fewstep.scores import Reference, load_reference, shared_outputs
from fewstep.stages.generate import SAMPLES
from fewstep.stages.ref_stats import ABOUT, STATS

Features = NDArray[np.floating]


def run(params: Params, a: str, b: str) -> None:
    """Print the differences of A and B, each with its interval and a verdict.

    Both are measured against the reference of this checkout, on the seeds that they share; the
    bootstrap takes the same ones of both.

    Raises:
        ValueError: no such row or revision, or no params.metric.bootstrap.
    """
    if (settings := params.metric.bootstrap) is None:
        raise ValueError(
            "need how often to resample, got nothing (params.yaml: metric.bootstrap: "
            "{ resamples: 100, confidence: 0.95 })"
        )
    ours, theirs, paired = shared_seeds(samples_of(a), samples_of(b))
    rank = Rank(0, 1, pick_device(params.device))
    extractor = feature_network(params, rank.device)
    features = [_features(extractor, x, rank, name) for x, name in ((ours, a), (theirs, b))]
    metrics = measures(params, load_reference(STATS), read_json(ABOUT)["metric"])
    print(
        f"{a} against {b}, {len(ours):,} images of each, of "
        f"{'the same' if paired else 'other'} seeds, {settings.resamples} resamples"
    )
    for name, metric in metrics.items():
        found = difference(features[0], features[1], metric, settings, paired)
        print(line(name, found, a, b))


def shared_seeds(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], bool]:
    """The images of seeds that both have, in one order, and whether there are such seeds.

    Without them as many images of either: a distance depends on how many there are.
    """
    both, mine, other = np.intersect1d(ours["seeds"], theirs["seeds"], return_indices=True)
    if len(both) == 0:
        mine = other = slice(min(len(ours["seeds"]), len(theirs["seeds"])))
    return ours["images"][mine], theirs["images"][other], len(both) > 0


def difference(
    a: Features, b: Features, metric: Callable[[Features], float], s: Bootstrap, paired: bool
) -> Difference:
    """What A scores more than B under the settings of params.metric.bootstrap."""
    return compare(a, b, metric, s.resamples, s.confidence, paired=paired)


def samples_of(row: str) -> dict[str, Any]:
    """Images, labels and seeds of a row, `NAME` or `REVISION:NAME`.

    Raises:
        ValueError: no such row or revision, or DVC has not kept its images.
    """
    revision, _, name = row.rpartition(":")
    path = SAMPLES / f"{name}.npz"
    try:
        file = io.BytesIO(_kept(revision, str(path))) if revision else path
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in ("images", "labels", "seeds")}
    except Exception as error:  # of DVC, git and numpy: dozens of classes
        raise ValueError(
            f"need the images of a row, NAME or REVISION:NAME, got {row!r}: {error} "
            "(make them with `dvc repro`, or bring them with `dvc fetch`)"
        ) from error


def _kept(revision: str, path: str) -> bytes:
    """A file as it was at a revision, from DVC's cache or remote."""
    from dvc.api import read  # a second, for those who ask

    return read(path, rev=revision, mode="rb")


def _features(extractor: Any, images: np.ndarray, rank: Rank, name: str) -> Features:  # noqa: ANN401
    found = shared_outputs(
        extractor, lambda part: images[part.start : part.stop], len(images), rank, f"compare {name}"
    )
    assert found is not None
    return found["features"]


def measures(
    params: Params, reference: Reference, label: str
) -> dict[str, Callable[[Features], float]]:
    """Metrics that resampling does justice to: KID and recall take repeated images for a fault."""

    def distance(x: Features) -> float:
        return frechet_distance(gaussian_stats(x), reference.stats)

    found: dict[str, Callable[[Features], float]] = {label: distance}
    if (m := params.metric.manifold) is not None:
        real = reference.features[: min(reference.kept, params.generate.images)]

        def precision(x: Features) -> float:
            return manifold(real, x, m.k, m.density_k).precision

        found["precision"] = precision
    return found


def line(name: str, d: Difference, a: str, b: str) -> str:
    """`FD-EffLite0  11.8 - 17.2 = -5.38, 95% in [-6.9, -3.8]: exceeds the noise, A is lower`."""
    verdict = (
        f"exceeds the noise, {a if d.value < 0 else b} is lower"
        if d.exceeds_noise
        else "within the noise"
    )
    return (
        f"{name:<14}{d.a:10.4g} - {d.b:.4g} = {d.value:+.4g}, "
        f"{d.confidence:.0%} in [{d.low:+.3g}, {d.high:+.3g}]: {verdict}"
    )
