"""`fewstep ref-stats`: feature statistics of real images, and the real-against-real floor."""

import numpy as np

from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import pick_device
from fewstep.evaluate import FEATURE_BATCH, real_images
from fewstep.files import write_json
from fewstep.metrics.features import FeatureExtractor, extract, load_features
from fewstep.metrics.frechet import frechet_distance, gaussian_stats, save_stats
from fewstep.params import Params
from fewstep.progress import progress
from fewstep.train import DATA

STATS = DATA.with_name("ref-stats.npz")
ABOUT = STATS.with_suffix(".json")


def run(params: Params) -> None:
    """Statistics of reference_images images; the floor is the distance of as many others as a row
    has images, from the rest of the data.

    Raises:
        ValueError: the data are too few for both.
    """
    dataset = ImageDataset(DATA, params.data.classes)
    wanted, rest = params.metric.reference_images, params.generate.images
    if wanted + rest > len(dataset):
        raise ValueError(
            f"need {wanted} + {rest} disjoint images, got {len(dataset)} in {DATA} "
            "(params.yaml: metric.reference_images, generate.images)"
        )
    extractor = load_features(params.metric.features, pick_device(params.device))
    images, _ = dataset.read(real_images(dataset, wanted + rest))
    features = features_of(extractor, images, "ref-stats")
    reference, other = gaussian_stats(features[:wanted]), gaussian_stats(features[wanted:])
    floor = frechet_distance(reference, other)
    save_stats(STATS, reference)
    about = {
        "metric": extractor.label,
        "detector_sha256": extractor.sha256,
        "data_sha256": dataset.content_sha256(),
        "reference_images": wanted,
        "floor": {"value": floor, "images": rest, "other_images": wanted},
    }
    write_json(ABOUT, about)
    print(
        f"ref-stats: {extractor.label} of {rest} real images against {wanted} others: {floor:.2f}"
    )


def features_of(extractor: FeatureExtractor, images: np.ndarray, desc: str) -> np.ndarray:
    """Features of uint8 images (N, C, H, W), with progress: float32 (N, d)."""
    with progress(len(images), desc) as bar:
        return extract(extractor, images, FEATURE_BATCH, bar.update)
