"""Images as files that people look at."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.arrays import save_arrays
from fewstep.files import atomic_path
from fewstep.report import tile

SHORTEST, COLUMNS = 512, 10  # pixels that a grid's side has at least; images in a line


def write(
    folder: Path,
    images: NDArray[np.uint8],
    labels: Sequence[int],
    seeds: Sequence[int],
    names: Sequence[str] = (),
) -> None:
    """The images (N, C, H, W) as a grid, one by one, and as arrays.

    Args:
        names: of the classes, for the files; none if empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scale = max(1, SHORTEST // (COLUMNS * images.shape[-1]))
    save(folder / "grid.png", tile(images, min(COLUMNS, len(images)), scale))
    for image, label, seed in zip(images, labels, seeds, strict=True):
        what = f"class{label}" + (f"-{as_file(names[label])}" if names else "")
        save(folder / f"{seed:06d}-{what}.png", tile(image[None], 1, 1))
    arrays = {"images": images, "labels": np.array(labels), "seeds": np.array(seeds)}
    save_arrays(folder / "images.npz", arrays)


def as_file(name: str) -> str:
    """A class name as a part of a file's name: `T-shirt/top` as `T-shirt-top`."""
    return re.sub(r"[^\w.-]+", "-", name)[:60].strip("-") or "unnamed"


def save(path: Path, picture: NDArray[np.uint8]) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
