"""The pictures of docs/recipes.md, of a finished training.

`python docs/recipe.py dmd2-1 --kimg 5 10 20 40 60` reads its log and the images that its
validations left in artifacts. It writes recipe-curves.png, the validations and the main loss, and
recipe-images.png: a line of images of the same seeds for the first validation at or after each of
these times.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fewstep.files import read_json
from fewstep.paths import MODELS
from fewstep.report.charts import loss_curves
from fewstep.report.frames import logs_frame
from fewstep.report.moments import images_of, moments
from fewstep.report.pictures import save_png, tile, white_figure

HERE, SCALE, LEFT = Path(__file__).parent, 3, 60  # pixels for the times


def images(name: str, kimg: Sequence[float]) -> Figure:
    found = moments(name)
    times = [min(nimg for nimg in found if nimg >= 1000 * k) for k in kimg]
    lines = [images_of(found[nimg]) for nimg in times]
    picture = tile(np.concatenate(lines), len(lines[0]), SCALE)
    height, width = picture.shape[:2]
    figure = white_figure(width + LEFT, height)
    figure.figimage(picture, LEFT, 0)
    for line, nimg in enumerate(times):
        middle = 1 - (line + 0.5) / len(times)
        figure.text(0.005, middle, f"{nimg / 1000:.2g} kimg", fontsize=8, va="center")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the training")
    parser.add_argument("--kimg", type=float, nargs="+", required=True, help="times of the images")
    given = parser.parse_args()
    main_loss = read_json(MODELS / given.name / "model.json")["main_loss"]
    logs = logs_frame([given.name])
    shown = logs["name"].str.startswith("validation/") | (logs["name"] == main_loss)
    loss_curves(logs[shown], [given.name], HERE / "recipe-curves.png")
    save_png(images(given.name, given.kimg), HERE / "recipe-images.png")


if __name__ == "__main__":
    main()
