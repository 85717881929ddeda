"""CLIP maximum mean discrepancy (Jayasumana et al. 2024, arXiv:2401.09603)."""

import numpy as np
from numpy.typing import NDArray

from fewstep.metrics.features import check_features
from fewstep.metrics.mmd import biased_mmd2, gaussian_kernel

SIGMA = 10.0  # section 4: the score hardly depends on it
SCALE = 1000.0  # section 4: for readable numbers


def cmmd(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """1000 times the squared MMD of unit embeddings under a Gaussian kernel of sigma 10.

    As in the paper's code, embeddings are scaled to length 1, and a row's pair with itself counts,
    which adds at most 20 / N + 20 / M to the score.

    Args:
        a, b: embeddings, shapes (N, d) and (M, d); published numbers use CLIP ViT-L/14 at 336
            pixels.

    Raises:
        ValueError: embeddings that do not fit together, are not finite, or have length 0.
    """
    check_features(a, b)
    return SCALE * biased_mmd2(_unit(a), _unit(b), gaussian_kernel(SIGMA))


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("need embeddings of length above 0, got 0 (params.yaml: metric.features)")
    return rows / lengths
