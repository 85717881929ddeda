"""The data order, a pure function of how many images training has seen."""

from functools import lru_cache

import numpy as np


def batch_indices(nimg: int, batch: int, size: int, seed: int) -> np.ndarray:
    """Which images are number nimg, nimg + 1, ..., nimg + batch - 1 of training.

    Position p is place p % size of the permutation of epoch p // size, keyed by (seed, epoch).
    Nothing else matters: not the rank, the world size, the batch, or where a run was resumed.

    Args:
        nimg: images seen before, >= 0.
        batch: images wanted, >= 1; they may span epochs.
        size: images in the dataset, >= 1.
        seed: >= 0.

    Returns:
        int64 (batch,), in [0, size).

    Raises:
        ValueError: an argument below its bound.
    """
    for name, value, least in [
        ("nimg", nimg, 0), ("batch", batch, 1), ("size", size, 1), ("seed", seed, 0)
    ]:  # fmt: skip
        if value < least:
            raise ValueError(f"need {name} >= {least}, got {value}")
    positions = np.arange(nimg, nimg + batch)
    epochs, places = positions // size, positions % size
    parts = [
        _permutation(size, seed, int(epoch))[places[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """One epoch's order, int64 (size,); read-only, because it is cached.

    Sorts raw PCG64 words: numpy promises those for ever, but may change Generator.permutation.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order
