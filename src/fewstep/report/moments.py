"""A student's images as its training goes: kept by each validation, shown beside the curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.paths import SNAPSHOTS
from fewstep.report.drawn import COLUMNS, save
from fewstep.report.pictures import GAP, Picture, lines_that_fit, tile

FILE = "samples-{:0>12}.png"  # by nimg
MOST = 8  # lines of a picture


def save_moment(folder: Path, images: NDArray[np.uint8], nimg: int) -> None:
    """Write the first images of a validation, (N, C, H, W), as one line."""
    save(folder / FILE.format(nimg), tile(images[:COLUMNS], COLUMNS, 1))


def moments(name: str) -> dict[int, Path]:
    """The lines that the validations of a training left, by nimg, the first one first."""
    files = sorted((SNAPSHOTS / name).glob("samples-*.png"))
    return {int(file.stem.split("-")[1]): file for file in files}


def moment_pictures(names: Sequence[str]) -> dict[str, Picture]:
    """By training a line of images for some of its validations; nothing where it had none."""
    pictures = {}
    for name in names:
        found = list(moments(name).items())
        if not found:
            continue
        line = images_of(found[0][1])
        fit = lines_that_fit(2 * len(names), len(line), line.shape[1:], MOST)  # half of the page's
        places = np.linspace(0, len(found) - 1, min(len(found), fit)).round().astype(int)
        times = [f"{found[place][0] / 1000:g}" for place in places]
        images = np.concatenate([images_of(found[place][1]) for place in places])
        caption = f"From the top: after {', '.join(times)} kimg"
        pictures[name] = Picture(f"{name}: the same seeds over time", caption, images, len(line))
    return pictures


def images_of(path: Path) -> NDArray[np.uint8]:
    """The images (N, 3, H, W) of a line, which are square."""
    line = np.asarray(Image.open(path))
    lefts = range(0, line.shape[1], len(line) + GAP)
    return np.stack([line[:, left : left + len(line)].transpose(2, 0, 1) for left in lefts])
