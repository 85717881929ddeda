"""Inception Score (Salimans et al. 2016, arXiv:1606.03498, section 4)."""

import numpy as np
from numpy.typing import NDArray


def inception_score(
    logits: NDArray[np.floating], splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class): mean and std over splits.

    The score grows with the images of a split, so it is compared at equal N / splits. Images are
    shuffled first: their order often goes by class, and a split of few classes scores low.

    Args:
        logits: shape (N, classes), those of Inception-2015 without bias.
        splits: parts of (nearly) equal size, each scored by itself.
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
    log_p = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # a class whose probability is 0 everywhere adds nothing
    log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
