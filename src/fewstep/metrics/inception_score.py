"""Inception Score (Salimans et al. 2016, arXiv:1606.03498, section 4)."""

import numpy as np
from numpy.typing import NDArray


def inception_score(
    logits: NDArray[np.floating], splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class): mean and std over splits.

    The score grows with the images per split, so only compare scores with equal N / splits. Images
    are shuffled first: they are often sorted by class, and a split with few classes scores low.

    Args:
        logits: shape (N, classes), those of Inception-2015 without bias.
        splits: parts of (nearly) equal size, scored separately.
        seed: of the shuffle.

    Raises:
        ValueError: not a matrix, NaN or infinity, or fewer images than splits.
    """
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise ValueError(f"need finite logits of shape (N, classes), got shape {logits.shape}")
    if not 1 <= splits <= len(logits):
        raise ValueError(
            f"need 1 to {len(logits)} splits, got {splits} "
            "(params.yaml: metric.inception_score.splits)"
        )
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = [_score(logits[part]) for part in np.array_split(order, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: NDArray[np.floating]) -> float:
    from scipy.special import rel_entr, softmax

    p = softmax(logits.astype(np.float64), axis=1)
    # `rel_entr`, because a class of probability 0 must add 0, not NaN
    return float(np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()))
