"""`fewstep fid ROW`: Fréchet distance of a row's images -> artifacts/scores/ROW.json."""

from pathlib import Path

import numpy as np

from fewstep.distributed import pick_device
from fewstep.files import read_json, write_json
from fewstep.metrics.features import load_features
from fewstep.metrics.frechet import frechet_distance, gaussian_stats, load_stats
from fewstep.params import Params
from fewstep.report import format_row
from fewstep.stages.generate import SAMPLES, row_of
from fewstep.stages.ref_stats import ABOUT, STATS, features_of

SCORES = Path("artifacts/scores")


def run(params: Params, name: str) -> None:
    """Score a row against artifacts/ref-stats.npz.

    Raises:
        ValueError: the reference was made with another feature network.
    """
    row_of(params, name)
    extractor = load_features(params.metric.features, pick_device(params.device))
    reference, about = load_stats(STATS), read_json(ABOUT)
    if about["detector_sha256"] != extractor.sha256:
        raise ValueError(f"need a reference of {extractor.label}, got {about['metric']} in {ABOUT}")
    with np.load(SAMPLES / f"{name}.npz") as samples:
        features = features_of(extractor, samples["images"], f"fid {name}")
    score = {
        **read_json(SAMPLES / f"{name}.json"),
        "metric": extractor.label,
        "value": frechet_distance(gaussian_stats(features), reference),
        "detector_sha256": extractor.sha256,
        "data_sha256": about["data_sha256"],
        "reference_images": about["reference_images"],
    }
    write_json(SCORES / f"{name}.json", score)
    print(format_row(score))
