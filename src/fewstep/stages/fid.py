"""`fewstep fid ROW`: all metrics of a row's images -> artifacts/scores/ROW.json."""

import numpy as np

from fewstep.files import read_json, write_json
from fewstep.metrics.features import shared_outputs
from fewstep.metrics.reference import feature_network
from fewstep.metrics.score import noted, score_ranges, summary
from fewstep.params import Params, plain
from fewstep.paths import SAMPLES, SCORES, STATS_ABOUT
from fewstep.report import format_row
from fewstep.report.provenance import remember
from fewstep.sampling.row import row_of
from fewstep.training.launch import ranks

HELP = "score the images of a row"
NAME = "a row of params.yaml"


def run(params: Params, name: str) -> None:
    """Score a row against artifacts/ref-stats.npz.

    Raises:
        ValueError: the reference was made with another feature network, or is not the one in
            params.metric.reference.
    """
    row_of(params, name)
    with np.load(SAMPLES / f"{name}.npz") as samples:
        images, labels, seeds = (samples[key] for key in ("images", "labels", "seeds"))
    with ranks(params.device, if_several=True) as rank:
        extractor, about = feature_network(params, rank.device), read_json(STATS_ABOUT)
        if about["detector_sha256"] != extractor.sha256:
            raise ValueError(
                f"need a reference for {extractor.label}, got {about['metric']} in {STATS_ABOUT}"
            )
        if about.get("reference_file") != plain(params.metric.reference):
            raise ValueError(
                f"need the reference {plain(params.metric.reference) or 'of our own data'}, got "
                f"{about.get('reference_file') or 'that of our own data'} in {STATS_ABOUT}; run "
                "`fewstep ref-stats` again (params.yaml: metric.reference)"
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
