"""`fewstep sample MODEL`: images of a student, the teacher or any checkpoint -> a new folder."""

from argparse import ArgumentParser
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.model import Model, load
from fewstep.params import Params
from fewstep.paths import MODELS, PICTURES
from fewstep.planning.order import model_file, refuse_missing
from fewstep.progress import progress
from fewstep.report.drawn import write
from fewstep.sampling.classes import chosen_classes, class_names
from fewstep.sampling.numbers import parse
from fewstep.stages.import_ import name_of, taken
from fewstep.theory.sample import nfe

HELP = "draw images with a model or checkpoint: a grid, PNGs, NPZ"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a name of params.yaml, or a checkpoint")
    parser.add_argument("--classes", help="as 0-9,20 or by names, used in turn; default: all")
    parser.add_argument("--seeds", default="0-63", help="as 0-63,100, an image each; default: 0-63")
    parser.add_argument("--steps", type=int, help="default: as many as it was trained for")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; default: 1, off")
    parser.add_argument("--sampler", help="such as heun or ddim; default: its method's")
    parser.add_argument("--out", type=Path, help="new folder; default: one in artifacts")


def run(
    params: Params,
    model: str,
    classes: str | None,
    seeds: str,
    steps: int | None,
    guidance: float,
    sampler: str | None,
    out: Path | None,
) -> None:
    """Draw an image for each seed: grid.png, one PNG an image, images.npz.

    Args:
        model: a name in params.yaml, or the file or folder of a checkpoint.
        classes: written like `seeds`, or as names; images take them in turn. None for all.
        seeds: numbers and inclusive ranges, such as 0-63,100.
        steps, sampler: None for those that the model says it was trained for, or 18 of Heun.

    Raises:
        ValueError: no such model, a folder that has something in it, or invalid arguments.
    """
    numbers = parse(seeds, "--seeds")
    drawing = load_named(model, params)
    names = class_names(drawing.about)
    turns = chosen_classes(classes, names) if classes else range(max(drawing.classes, 1))
    row = drawing.row(sampler, steps, guidance)
    labels = [turns[i % len(turns)] for i in range(len(numbers))]
    drawn = drawing.draw(row, numbers, labels, params.generate.batch)
    folder, made = new_folder(out, model), list[NDArray[np.uint8]]()
    with progress(len(numbers), f"sample {model}") as bar:
        for found, _ in drawn:
            made.append(found)
            bar.update(len(found))
    images = np.concatenate(made)
    write(folder, images, labels, numbers, names)
    calls = nfe(row.sampler, row.steps, row.guidance_scale)
    print(f"sample: {len(images)} images of {model}, {row.sampler}, {calls} NFE, in {folder}")


def load_named(model: str, params: Params) -> Model:
    """The model of that name, or in that file or folder, to be computed as the params say.

    The params also say what a file does not: sigma_data, and the grid of a teacher.

    Raises:
        ValueError: there is no such model, or none that can be sampled.
    """
    path = place_of(model)
    if not path.exists():
        known = ["teacher", *params.students, *params.imports]
        if model in known:
            refuse_missing([model_file(model, params)])
        raise ValueError(
            f"need a finished model ({', '.join(known)}) or the file or folder of a checkpoint, "
            f"got {model!r}"
        )
    return load(
        path,
        device=params.device,
        precision=params.precision,
        sigma_data=params.network.sigma_data,
        noise=params.noise,
        performance=params.performance,
    )


def place_of(model: str) -> Path:
    """Where a model is that is named, or given as a path."""
    folder = MODELS / model
    made = folder.is_dir() and any(folder.iterdir())  # NAME@best is empty without validation
    return folder if made else Path(model)


def new_folder(out: Path | None, model: str) -> Path:
    """An empty folder, so that pictures of two runs never mix.

    Args:
        out: which one; None: in artifacts/pictures, called as the model, numbered if need be.

    Raises:
        ValueError: `out` has something in it.
    """
    if out is not None:
        if taken(out):
            raise ValueError(f"need a folder that is new or empty, got {out}, which is not (--out)")
        out.mkdir(parents=True, exist_ok=True)
        return out
    name = model if "@" in model and "/" not in model else name_of(Path(model))
    for number in count(1):
        folder = PICTURES / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)  # fails where another run was faster
            return folder
        except FileExistsError:
            continue
    raise AssertionError("numbers do not end")
