"""Two rows side by side, seed by seed: do they differ by more than their seeds?

A row is a name, of this checkout, or REVISION:NAME, of what DVC keeps of that revision of git
(a branch, a commit, an experiment).
"""

import io
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fewstep.distributed import Rank, pick_device
from fewstep.files import read_json
from fewstep.metrics.bootstrap import Features, Score, compare
from fewstep.metrics.features import FeatureExtractor, shared_outputs
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.metrics.manifold import manifold
from fewstep.metrics.reference import Reference, feature_network, load_reference
from fewstep.params import Params
from fewstep.paths import SAMPLES, STATS, STATS_ABOUT

Arrays = dict[str, Any]
HIGHER = ("precision",)  # of these metrics more is better
WIDTH = 100  # of text in a terminal


def differences_frame(params: Params, a: str, b: str) -> pd.DataFrame:
    """What row A scores more than row B: a line a metric, which is its index.

    Both are measured against the reference of this checkout, on the seeds that they share; the
    bootstrap takes the same ones of both. Without a common seed, as many images are taken of
    either, because a distance depends on their number.

    Returns:
        Columns of `metrics.bootstrap.Difference`, and `exceeds_noise`, `images`, `paired`.

    Raises:
        ValueError: no such row or revision, or no params.metric.bootstrap.
    """
    if (s := params.metric.bootstrap) is None:
        raise ValueError(
            "need how often to resample, got nothing (params.yaml: metric.bootstrap: "
            "{ resamples: 100, confidence: 0.95 })"
        )
    ours, theirs, paired = shared_seeds(images_of(a), images_of(b))
    rank = Rank(0, 1, pick_device(params.device))
    extractor = feature_network(params, rank.device)
    x, y = (_features(extractor, images, rank, name) for images, name in ((ours, a), (theirs, b)))
    scores = comparable_scores(params, load_reference(STATS), read_json(STATS_ABOUT)["metric"])
    found = {
        name: compare(x, y, score, s.resamples, s.confidence, paired=paired)
        for name, score in scores.items()
    }
    lines = [{**vars(d), "exceeds_noise": d.exceeds_noise} for d in found.values()]
    return pd.DataFrame(lines, index=list(found)).assign(images=len(x), paired=paired)


def shared_seeds(ours: Arrays, theirs: Arrays) -> tuple[NDArray[np.uint8], NDArray[np.uint8], bool]:
    """The images of seeds that both have, in one order, and whether there are such seeds."""
    both, mine, other = np.intersect1d(ours["seeds"], theirs["seeds"], return_indices=True)
    if len(both) == 0:
        mine = other = slice(min(len(ours["seeds"]), len(theirs["seeds"])))
    return ours["images"][mine], theirs["images"][other], len(both) > 0


def images_of(row: str) -> Arrays:
    """Images and seeds of a row, `NAME` or `REVISION:NAME`.

    Raises:
        ValueError: no such row or revision, or DVC has not kept its images.
    """
    revision, _, name = row.rpartition(":")
    path = SAMPLES / f"{name}.npz"
    try:
        file = io.BytesIO(_kept(revision, str(path))) if revision else path
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in ("images", "seeds")}
    except Exception as error:  # of DVC, git and numpy: dozens of classes
        raise ValueError(
            f"need the images of a row, NAME or REVISION:NAME, got {row!r}: {error} "
            "(make them with `dvc repro`, or bring them with `dvc fetch`)"
        ) from error


def _kept(revision: str, path: str) -> bytes:
    """A file as it was at a revision, from DVC's cache or remote."""
    from dvc.api import read  # a second, for those who ask

    return read(path, rev=revision, mode="rb")


def _features(
    extractor: FeatureExtractor, images: NDArray[np.uint8], rank: Rank, name: str
) -> Features:
    found = shared_outputs(
        extractor, lambda part: images[part.start : part.stop], len(images), rank, f"compare {name}"
    )
    assert found is not None
    return found["features"]


def comparable_scores(params: Params, reference: Reference, label: str) -> dict[str, Score]:
    """Metrics that survive resampling: KID and recall count repeated images as a fault."""

    def distance(x: Features) -> float:
        return frechet_distance(gaussian_stats(x), reference.stats)

    if (m := params.metric.manifold) is None:
        return {label: distance}
    real = reference.features[: min(reference.kept, params.generate.images)]

    def precision(x: Features) -> float:
        return manifold(real, x, m.k, m.density_k).precision

    return {label: distance, "precision": precision}


def as_text(differences: pd.DataFrame, a: str, b: str) -> str:
    """A heading, a table with a line and a verdict for each metric, and how to read it."""
    first = differences.iloc[0]
    seeds = "the same seeds" if first["paired"] else "other seeds"
    interval = f"{first['confidence']:.0%} interval"
    table = [
        ["", a, b, "difference", interval, ""],
        *(_line(d, a) for d in differences.itertuples()),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    head = f"{a} against {b}: {first['images']:,} images of each, {seeds}"
    return "\n".join([head, "", *lines, "", how_to_read(differences)])


def _line(d: Any, a: str) -> list[str]:  # noqa: ANN401
    """`FD-EffLite0`, both scores, their difference, its interval, and what that says of A."""
    higher = d.Index in HIGHER
    better = (d.value > 0) == higher
    verdict = f"{a} is {'better' if better else 'worse'}" if d.exceeds_noise else "no difference"
    numbers = [f"{d.a:.4g}", f"{d.b:.4g}", f"{d.value:+.3g}", f"{d.low:+.3g} to {d.high:+.3g}"]
    return [f"{d.Index} ({'higher' if higher else 'lower'} is better)", *numbers, verdict]


def how_to_read(differences: pd.DataFrame) -> str:
    """What the numbers are, and why they are not the table's."""
    first = differences.iloc[0]
    text = (
        f"The interval is of the difference, over {first['resamples']} resamples of the images. "
        "Where it contains 0, the choice of seeds alone explains the difference: the verdict is "
        "no difference. Both scores are of all these images together. The table's are means over "
        "ranges of seeds, and a distance falls as images are added, so the two are not equal."
    )
    if not first["paired"]:
        text += " The rows share no seed, so their common noise does not cancel."
    return textwrap.fill(text, WIDTH)
