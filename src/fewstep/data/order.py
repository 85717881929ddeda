"""The data order: a pure function of the number of images that training has seen."""

from functools import lru_cache

import numpy as np


def batch_indices(nimg: int, batch: int, size: int, seed: int) -> np.ndarray:
    """Indices of training images number nimg, nimg + 1, ..., nimg + batch - 1.

    Position p is place p % size in the permutation of epoch p // size, keyed by (seed, epoch). The
    rank, the world size, the batch size and the point of a resume have no influence.

    Args:
        nimg: images seen before, >= 0.
        batch: images wanted, >= 1; they may span epochs.
        size: images in the dataset, >= 1.
        seed: >= 0.

    Returns:
        int64 (batch,), in [0, size).
    """
    bounds = {"nimg": (nimg, 0), "batch": (batch, 1), "size": (size, 1), "seed": (seed, 0)}
    for name, (value, least) in bounds.items():
        if value < least:
            raise ValueError(f"need {name} >= {least}, got {value}")
    positions = np.arange(nimg, nimg + batch)
    epochs, places = positions // size, positions % size
    parts = [
        _permutation(size, seed, int(epoch))[places[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(parts)


@lru_cache(maxsize=4)  # 10 MB each for ImageNet; a batch may span two epochs
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 (size,); read-only, because it is cached.

    It sorts raw PCG64 words: numpy guarantees their stream, but not that of
    Generator.permutation, and a new order would break every resumed run.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order
