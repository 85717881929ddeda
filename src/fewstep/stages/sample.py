"""`fewstep sample MODEL`: images of a student, the teacher or any checkpoint -> a folder."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.budgets import STEPS, within
from fewstep.distributed import pick_device
from fewstep.interop.load import load
from fewstep.params import Params, Row, Settings
from fewstep.paths import PICTURES
from fewstep.progress import progress
from fewstep.quoting import quoted
from fewstep.report.drawn import write
from fewstep.sampling.batches import batches, generate_batches
from fewstep.sampling.classes import chosen_classes, class_names
from fewstep.sampling.numbers import parse
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SAMPLERS, nfe

HELP = "draw images with a model or checkpoint: a grid, PNGs, NPZ"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a name of params.yaml, or a checkpoint")
    parser.add_argument("--classes", help="as 0-9,20 or by names, used in turn; default: all")
    parser.add_argument("--seeds", default="0-63", help="as 0-63,100, an image each; default: 0-63")
    parser.add_argument("--steps", type=int, help="default: as many as it was trained for")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; default: 1, off")
    parser.add_argument("--sampler", help="such as heun or ddim; default: its method's")
    parser.add_argument("--out", type=Path, help="folder; default: a new one in artifacts")


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
        model: a name in params.yaml, or the file or folder of a checkpoint of the same network.
        classes: written like `seeds`, or as names; images take them in turn. None for all.
        seeds: numbers and inclusive ranges, such as 0-63,100.
        steps, sampler: None for those that the model says it was trained for, or 18 of Heun.

    Raises:
        ValueError: no such model, a model of another network, or invalid arguments.
    """
    numbers = parse(seeds, "--seeds")
    denoiser, about = load(model, params)
    names = class_names(about)
    count = max(params.data.classes, 1)
    chosen = chosen_classes(classes, names) if classes else list(range(count))
    if wrong := [c for c in chosen if c >= count]:
        raise ValueError(f"need --classes below {count}, got {wrong[0]}")
    grid = Schedule.of_model(about, params.noise)
    row, device = row_of(model, about, sampler, steps, guidance), pick_device(params.device)
    labels = [chosen[i % len(chosen)] for i in range(len(numbers))]
    parts, made = batches(numbers, params.generate.batch), list[NDArray[np.uint8]]()
    with progress(len(numbers), f"sample {model}") as bar:
        drawn = generate_batches(params, row, denoiser.to(device), grid, parts, device, labels)
        for found, _ in drawn:
            made.append(found)
            bar.update(len(found))
    images, folder = np.concatenate(made), out or PICTURES / Path(model).stem
    write(folder, images, labels, numbers, names)
    calls = nfe(row.sampler, row.steps, row.guidance_scale)
    print(f"sample: {len(images)} images of {model}, {row.sampler}, {calls} NFE, in {folder}")


def row_of(
    model: str, about: dict[str, Any], sampler: str | None, steps: int | None, guidance: float
) -> Row:
    """How to sample the model: as asked, else as its JSON says, else as a teacher."""
    usual, own = Settings().sampling
    if said := about.get("sampling"):
        usual, own = said.get("sampler"), said.get("steps")
    name = sampler or usual
    known = [s for s in SAMPLERS if s != "churn"]  # which needs four more numbers
    if name not in known:
        raise ValueError(f"need --sampler of {', '.join(known)}, got {quoted(name)}")
    count = own if steps is None else steps
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"need --steps of at least 1, got {quoted(count)}")
    within(count, STEPS, "--steps")
    return Row(model, name, count, guidance)  # pyright: ignore[reportArgumentType]
