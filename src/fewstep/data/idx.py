"""MNIST and its kin as they are published: gzipped idx files of grey images and of labels.

An idx file is two zeros, a type (8 is uint8), the number of dimensions, their sizes as big-endian
32-bit integers, and the bytes (LeCun et al. 1998, yann.lecun.com/exdb/mnist).
"""

import gzip
import math
from pathlib import Path

import numpy as np

from fewstep.arrays import DAMAGE
from fewstep.budgets import UNPACKED, Bounded, regular
from fewstep.quoting import printable

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
_UINT8 = 8


def is_idx(folder: Path) -> bool:
    """Whether a folder has the images for training under their published name."""
    return (folder / IMAGES).is_file()


def read_idx_folder(folder: Path, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images, uint8 (N, 1, resolution, resolution), and labels, int64 (N,).

    Smaller images get a black frame: 28x28 in the middle of 32x32, as LeNet takes them.

    Raises:
        ValueError: a file that is missing, damaged or of another kind, or images larger than the
            resolution or with an odd difference.
    """
    images = read_idx(folder / IMAGES, dimensions=3)
    labels = read_idx(folder / LABELS, dimensions=1)
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"need a label for each of at least 1 image, got {len(images)} images and "
            f"{len(labels)} labels in {folder} (params.yaml: data.source)"
        )
    height, width = images.shape[1:]
    around = resolution - height
    if height != width or around < 0 or around % 2:
        raise ValueError(
            f"need square images and a resolution that an even black frame leads to, got images of "
            f"{height}x{width} in {folder} and resolution {resolution} "
            "(params.yaml: data.resolution)"
        )
    frame = (around // 2, around // 2)
    return np.pad(images, ((0, 0), frame, frame))[:, None], labels.astype(np.int64)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a gzipped idx file.

    Raises:
        ValueError: no intact file of that kind, or one that unpacks to more than its budget.
    """
    try:
        with gzip.open(regular(path)) as packed:
            content = Bounded(packed, UNPACKED, f"an unpacked {path.name}").read()  # pyright: ignore
        head, start = content[:4], 4 + 4 * dimensions
        if head != bytes([0, 0, _UINT8, dimensions]) or len(content) < start:
            raise ValueError(f"it begins with {head.hex(' ') or 'nothing'}")
        shape = [int(n) for n in np.frombuffer(content, ">u4", dimensions, 4)]
        if len(content) - start != math.prod(shape):
            raise ValueError(f"{len(content) - start} bytes for sizes {shape}")
    except DAMAGE as error:
        raise ValueError(
            f"need an intact gzipped idx file of uint8 with {dimensions} dimensions, got {path}: "
            f"{printable(str(error), keep='')} (params.yaml: data.source)"
        ) from error
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
