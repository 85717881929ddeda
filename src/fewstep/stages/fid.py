"""`fewstep fid ROW`: all metrics of a row's images -> artifacts/scores/ROW.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.distributed import Rank
from fewstep.evaluate import feature_network
from fewstep.files import read_json, sha256_file, write_json
from fewstep.launch import ranks, several_gpus
from fewstep.metrics.features import FeatureExtractor
from fewstep.params import Params, digest, plain
from fewstep.provenance import remember
from fewstep.report import format_row
from fewstep.scores import (
    Outputs,
    Scores,
    class_means,
    load_reference,
    noted,
    score,
    shared_outputs,
    spread,
)
from fewstep.stages.generate import SAMPLES, row_of
from fewstep.stages.ref_stats import ABOUT, STATS

SCORES = Path("artifacts/scores")


def run(params: Params, name: str) -> None:
    """Score a row against artifacts/ref-stats.npz.

    Raises:
        ValueError: the reference was made with another feature network, or is another one than
            params.metric.reference.
    """
    row_of(params, name)
    with np.load(SAMPLES / f"{name}.npz") as samples:
        images, labels, seeds = (samples[key] for key in ("images", "labels", "seeds"))
    with ranks(params.device, several_gpus(params.device)) as rank:
        extractor, about = feature_network(params, rank.device), read_json(ABOUT)
        if about["detector_sha256"] != extractor.sha256:
            raise ValueError(
                f"need a reference of {extractor.label}, got {about['metric']} in {ABOUT}"
            )
        if about.get("reference_file") != plain(params.metric.reference):
            raise ValueError(
                f"need the reference {plain(params.metric.reference) or 'of our own data'}, got "
                f"{about.get('reference_file') or 'that of our own data'} in {ABOUT}; make it "
                "again with `fewstep ref-stats` (params.yaml: metric.reference)"
            )
        outputs = shared_outputs(
            extractor, lambda part: images[part.start : part.stop], len(images), rank, f"fid {name}"
        )
        if outputs is None:
            return
        ranges, notes = noted(lambda: score_ranges(params, extractor, outputs, labels, rank))
    result = {
        **read_json(SAMPLES / f"{name}.json"),
        **summary(params, extractor, ranges, seeds, about),
        "notes": notes,
    }
    write_json(SCORES / f"{name}.json", result)
    remember(name, SCORES / f"{name}.json")
    print(format_row(result))


def score_ranges(
    params: Params, extractor: FeatureExtractor, outputs: Outputs, labels: np.ndarray, rank: Rank
) -> list[Scores]:
    """The scores of each seed range by itself."""
    reference, size, settings = load_reference(STATS), params.generate.images, params.metric
    ranges = [slice(start, start + size) for start in range(0, len(labels), size)]
    if len(ranges) > 1:  # whose values have a spread of their own
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
    """Means, spreads, details, and what they were measured with; equal on every machine."""
    metrics = spread(ranges)
    first = ranges[0].neighbours
    return {
        "metric": extractor.label,
        "value": metrics[extractor.label]["value"],
        "std": metrics[extractor.label]["std"],
        "metrics": metrics,
        "classes": class_means(ranges),
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
