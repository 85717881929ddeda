"""`fewstep ref-stats`: the reference of all scores, and the floor: real images' own score.

If params.metric.reference names a published file, the Fréchet distance uses that; all other metrics
always use features of our own data.
"""

from fewstep.data.lmdb import ImageDataset
from fewstep.files import write_json
from fewstep.metrics.features import shared_outputs
from fewstep.metrics.reference import (
    feature_network,
    floor_images,
    looked_through,
    published_reference,
    real_images,
    reference_of,
    save_reference,
)
from fewstep.metrics.score import reference_summary
from fewstep.params import Params
from fewstep.paths import DATA, STATS, STATS_ABOUT
from fewstep.training.launch import ranks

HELP = "feature statistics of real images, and the real-against-real floor"


def run(params: Params) -> None:
    """Extract features of the reference images, and score other real images against them.

    Those are as many as a row's seed range has, so the floor has the same bias as a row.

    Raises:
        ValueError: there are too few images for both, or the published reference does not match.
    """
    dataset, m = ImageDataset(DATA, params.data.classes), params.metric
    rest = floor_images(params, len(dataset))
    count = max(m.reference_images + rest, looked_through(m, len(dataset)))
    places = real_images(dataset, count)
    with ranks(params.device, if_several=True) as rank:
        extractor = feature_network(params, rank.device)
        published = published_reference(params, extractor)  # first, as it may be refused
        outputs = shared_outputs(
            extractor, lambda part: dataset.read(places[part])[0], count, rank, "ref-stats"
        )
        if outputs is None:
            return
        labels = dataset.labels()[places]
        reference = reference_of(outputs, labels, places, params, rank, published)
        about = reference_summary(
            outputs, labels, reference, extractor, params, dataset.content_sha256(), rank
        )
    save_reference(STATS, reference)
    write_json(STATS_ABOUT, about)
    floor = about["floor"]
    others = m.reference.url if m.reference else f"{m.reference_images} others"
    print(
        f"ref-stats: {extractor.label} of {floor['images']} real images against {others}: "
        f"{floor['value']:.2f}"
    )
