"""`fewstep sample MODEL`: images of a student, the teacher or any checkpoint -> a folder."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.budgets import SEEDS, STEPS, within
from fewstep.distributed import pick_device
from fewstep.interop.load import load
from fewstep.params import Params, Row, Settings
from fewstep.paths import PICTURES
from fewstep.progress import progress
from fewstep.quoting import quoted
from fewstep.report.drawn import write
from fewstep.sampling.batches import batches, generate_batches
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SAMPLERS, nfe

HELP = "draw images with a model or checkpoint: a grid, PNGs, NPZ"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a name of params.yaml, or a checkpoint")
    parser.add_argument("--classes", help="as 0-9,20, used in turn; default: all")
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
        classes: written like `seeds`; images take them in turn. None for all.
        seeds: numbers and inclusive ranges, such as 0-63,100.
        steps, sampler: None for those that the model says it was trained for, or 18 of Heun.

    Raises:
        ValueError: no such model, a model of another network, or invalid arguments.
    """
    numbers = parse(seeds, "--seeds")
    chosen = parse(classes, "--classes") if classes else list(range(params.data.classes))
    if wrong := [c for c in chosen if c >= params.data.classes]:
        raise ValueError(f"need --classes below {params.data.classes}, got {wrong[0]}")
    denoiser, about = load(model, params)
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
    write(folder, images, labels, numbers)
    calls = nfe(row.sampler, row.steps, row.guidance_scale)
    print(f"sample: {len(images)} images of {model}, {row.sampler}, {calls} NFE, in {folder}")


def parse(text: str, option: str) -> list[int]:
    """The numbers in a list such as 0-63,100.

    Raises:
        ValueError: the text is not such a list.
    """
    ranges: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f"need numbers and ranges such as 0-63,100, got {quoted(text)} ({option})"
            )
        if max(len(first), len(last)) > 19 or int(last or first) >= 2**63:
            raise ValueError(f"need numbers below 2^63, got {quoted(text)} ({option})")
        ranges.append(range(int(first), int(last or first) + 1))
    if not (count := sum(map(_length, ranges))):
        raise ValueError(f"need at least one number, got {text!r} ({option})")
    within(count, SEEDS, f"numbers for {option}")
    return [number for numbers in ranges for number in numbers]


def _length(numbers: range) -> int:
    """As `len`, which raises for ranges beyond 2^63."""
    return max(numbers.stop - numbers.start, 0)


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
