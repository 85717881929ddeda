"""How a training goes: its curves, and its images at some times, for docs/recipes.md.

`python benchmarks/recipe.py dmd2-1 --kimg 5 10 20 40 --out docs/recipe` trains that student of
params.yaml, with the data and the teacher that are in artifacts. It writes recipe-curves.png, the
losses and validations, and recipe-images.png: a line of images for each time at or after which
there was a validation, always of the same seeds.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fewstep.distributed import Rank, pick_device
from fewstep.params import load_params
from fewstep.report.charts import loss_curves
from fewstep.report.frames import logs_frame
from fewstep.report.pictures import save_png, tile, white_figure
from fewstep.training.loop import train
from fewstep.training.tracking import Tracker

ACROSS, SCALE = 20, 2


class Collector(Tracker):
    """A tracker that keeps the first images of each validation, by nimg."""

    def __init__(self) -> None:
        self.shown: dict[int, NDArray[np.uint8]] = {}

    def show(self, images: NDArray[np.uint8], nimg: int) -> None:
        self.shown[nimg] = images[:ACROSS]


def write_images(shown: dict[int, NDArray[np.uint8]], kimg: Sequence[float], path: Path) -> None:
    """One line of images for each of these times."""
    times = [min(nimg for nimg in shown if nimg >= 1000 * k) for k in kimg]
    picture = tile(np.concatenate([shown[nimg] for nimg in times]), ACROSS, SCALE)
    left = 60  # pixels for the times
    height, width = picture.shape[:2]
    figure = white_figure(width + left, height)
    figure.figimage(picture, left, 0)
    for line, nimg in enumerate(times):
        middle = 1 - (line + 0.5) / len(times)
        figure.text(0.005, middle, f"{nimg / 1000:.2g} kimg", fontsize=8, va="center")
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a student of params.yaml")
    parser.add_argument("--kimg", type=float, nargs="+", required=True, help="times of the images")
    parser.add_argument("--out", required=True, help="how the files' names begin")
    given = parser.parse_args()
    params = load_params("params.yaml")
    block = replace(params.students[given.name], kimg=max(given.kimg))
    students = MappingProxyType({**params.students, given.name: block})
    params, watcher = replace(params, students=students), Collector()
    train(given.name, params, Rank(0, 1, pick_device(params.device)), watcher)
    loss_curves(logs_frame([given.name]), [given.name], f"{given.out}-curves.png")
    write_images(watcher.shown, given.kimg, Path(f"{given.out}-images.png"))


if __name__ == "__main__":
    main()
