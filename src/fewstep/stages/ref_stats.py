"""`fewstep ref-stats`: what rows are scored against, and the real-against-real floor.

The Fréchet distance is against a published file where params.metric.reference names one; all other
metrics are against features of our own data in any case.
"""

from dataclasses import replace

import numpy as np

from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.evaluate import feature_network, published_reference, real_images
from fewstep.files import write_json
from fewstep.launch import ranks, several_gpus
from fewstep.metrics.features import FeatureExtractor
from fewstep.metrics.frechet import GaussianStats, gaussian_stats
from fewstep.metrics.memorisation import real_spacing
from fewstep.params import Metric, Params, plain
from fewstep.scores import (
    KEPT,
    Outputs,
    Reference,
    noted,
    save_reference,
    score,
    shared_outputs,
    spread,
)
from fewstep.train import DATA

STATS = DATA.with_name("ref-stats.npz")
ABOUT = STATS.with_suffix(".json")


def run(params: Params) -> None:
    """Features of the reference images; the floor is the score of others, from the rest of the
    data, as many as a range has images.

    Raises:
        ValueError: the data are too few for both, or a published reference is not what it should.
    """
    dataset, m = ImageDataset(DATA, params.data.classes), params.metric
    rest = floor_images(params, len(dataset))
    count = max(m.reference_images + rest, _looked_through(m, len(dataset)))
    places = real_images(dataset, count)
    with ranks(params.device, several_gpus(params.device)) as rank:
        extractor = feature_network(params, rank.device)
        published = published_reference(params, extractor)  # refused before the work, not after
        outputs = shared_outputs(
            extractor, lambda part: dataset.read(places[part])[0], count, rank, "ref-stats"
        )
        if outputs is not None:
            write(outputs, dataset, places, extractor, params, rank, published)


def floor_images(params: Params, images: int) -> int:
    """Real images for the floor, disjoint from those of the reference: as many as a range has.

    Beside a published reference, which may be of all the data, fewer will do: what there are.

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


def _looked_through(metric: Metric, images: int) -> int:
    """Training images among which copies are looked for; 0 where nobody asks.

    Raises:
        ValueError: more than there are.
    """
    wanted = metric.memorisation.images if metric.memorisation else None
    if (wanted or 0) > images:
        raise ValueError(
            f"need at most {images} images, which {DATA} has, got {wanted} "
            "(params.yaml: metric.memorisation.images)"
        )
    return wanted or 0


def write(
    outputs: Outputs,
    dataset: ImageDataset,
    places: np.ndarray,
    extractor: FeatureExtractor,
    params: Params,
    rank: Rank,
    published: GaussianStats | None = None,
) -> None:
    """Write the reference, and score real images beside those it is made of against it."""
    m, wanted = params.metric, params.metric.reference_images
    rest = floor_images(params, len(dataset))
    reference = reference_of(outputs, dataset.labels()[places], places, params, rank, published)
    other = slice(wanted, wanted + rest)
    real = {name: rows[other] for name, rows in outputs.items()}
    scores, notes = noted(
        lambda: score(
            real,
            dataset.labels()[places[other]],
            reference,
            extractor.label,
            replace(m, memorisation=None),  # they are training images themselves
            rank.device,
        )
    )
    save_reference(STATS, reference)
    about = {
        "metric": extractor.label,
        "detector": {"features": m.features, "sha256": extractor.sha256},
        "detector_sha256": extractor.sha256,
        "data_sha256": dataset.content_sha256(),
        "reference_file": plain(m.reference),
        "reference_images": wanted,
        "looked_through": len(reference.features) if m.memorisation else None,
        "settings": plain(m),
        "floor": {
            "value": scores.values[extractor.label],
            "images": rest,
            "other_images": wanted if published is None else None,
            "metrics": spread([scores]),
            "classes": {str(c): value for c, value in scores.classes.items()},
        },
        "notes": notes,
    }
    write_json(ABOUT, about)
    others = f"{wanted} others" if m.reference is None else m.reference.url
    print(
        f"ref-stats: {extractor.label} of {rest} real images against {others}: "
        f"{scores.values[extractor.label]:.2f}"
    )


def reference_of(
    outputs: Outputs,
    labels: np.ndarray,
    places: np.ndarray,
    params: Params,
    rank: Rank,
    published: GaussianStats | None = None,
) -> Reference:
    """The reference within features of real images, those of the reference first.

    Args:
        published: what the Fréchet distance is against instead of these images.
    """
    m, wanted = params.metric, params.metric.reference_images
    kept = min(wanted, KEPT)
    known = _looked_through(m, len(places)) or kept
    features, spatial = outputs["features"], outputs.get("spatial")
    spacing = np.empty(0)
    if m.memorisation is not None:
        spacing = real_spacing(features[:known], params.generate.images, rank.device)
    return Reference(
        stats=published or gaussian_stats(features[:wanted]),
        spatial=None if spatial is None else gaussian_stats(spatial[:wanted]),
        features=features[:known],
        labels=labels[:known].astype(np.int64),
        places=places[:known],
        kept=kept,
        real_distances=spacing,
    )
