"""Features of images that come in batches, as the stages extract them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.metrics.features import FeatureExtractor, extract_outputs


def features_of(
    network: FeatureExtractor | Callable[[Tensor], Tensor],
    images: NDArray[np.uint8],
    batch: int,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """Features (N, d) of images that are read `batch` at a time."""
    batches = (images[start : start + batch] for start in range(0, len(images), batch))
    workers = network.workers if isinstance(network, FeatureExtractor) else 0
    return extract_outputs(lambda x: {"features": network(x)}, batches, progress, workers)[
        "features"
    ]
