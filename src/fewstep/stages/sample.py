"""`fewstep sample MODEL`: images of a student, the teacher or any checkpoint -> a folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.denoiser import Denoiser
from fewstep.distributed import pick_device
from fewstep.evaluate import batches, generate_batches
from fewstep.files import atomic_path
from fewstep.interop.architecture import check_architecture
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.models import MODELS, build_denoiser, load_weights
from fewstep.params import ConsistencySettings, DenoisingSettings, Params, Row
from fewstep.progress import progress
from fewstep.report import tile
from fewstep.sample import SAMPLERS, nfe

FOLDER = Path("artifacts/pictures")
SHORTEST, COLUMNS = 512, 10  # pixels that a grid's side has at least; images in a line


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
        model: a name of params.yaml, or a file or folder of a checkpoint of the same network.
        classes: as `seeds`; image i is of the i-th of them, round and round. None: all in turn.
        seeds: numbers and ranges with both ends: 0-63,100.
        steps, sampler: None: what the student was trained for.

    Raises:
        ValueError: no such model, another network, or arguments that are none.
    """
    numbers = parse(seeds, "--seeds")
    chosen = parse(classes, "--classes") if classes else list(range(params.data.classes))
    if wrong := [c for c in chosen if c >= params.data.classes]:
        raise ValueError(f"need --classes below {params.data.classes}, got {wrong[0]}")
    row = row_of(model, params, sampler, steps, guidance)
    denoiser, device = load(model, params), pick_device(params.device)
    labels = [chosen[i % len(chosen)] for i in range(len(numbers))]
    parts, made = batches(numbers, params.generate.batch), list[NDArray[np.uint8]]()
    with progress(len(numbers), f"sample {model}") as bar:
        for found, _ in generate_batches(params, row, denoiser.to(device), parts, device, labels):
            made.append(found)
            bar.update(len(found))
    images, folder = np.concatenate(made), out or FOLDER / Path(model).stem
    write(folder, images, labels, numbers)
    calls = nfe(row.sampler, row.steps, row.guidance_scale)
    print(f"sample: {len(images)} images of {model}, {row.sampler}, {calls} NFE, in {folder}")


def parse(text: str, option: str) -> list[int]:
    """Numbers of a list such as 0-63,100.

    Raises:
        ValueError: something else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"need numbers and ranges such as 0-63,100, got {text!r} ({option})")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError(f"need at least one number, got {text!r} ({option})")
    if max(found) >= 2**63:
        raise ValueError(f"need numbers below 2^63, got {text!r} ({option})")
    return found


def row_of(
    model: str, params: Params, sampler: str | None, steps: int | None, guidance: float
) -> Row:
    """How the model is sampled: as said, else as the student's method does in its own steps."""
    block = params.students.get(model)
    if block is None or isinstance(block.settings, DenoisingSettings):
        usual, own = "heun", 18  # EDM's own, 35 NFE
    else:
        is_cd = isinstance(block.settings, ConsistencySettings)
        usual, own = "ddim" if is_cd else "renoise", block.settings.steps
    name = sampler or usual
    known = [s for s in SAMPLERS if s != "churn"]  # whose four numbers are a row's
    if name not in known:
        raise ValueError(f"need --sampler of {', '.join(known)}, got {name!r}")
    count = own if steps is None else steps
    if count < 1:
        raise ValueError(f"need --steps of at least 1, got {count}")
    return Row(model, name, count, guidance)  # pyright: ignore[reportArgumentType]


def load(model: str, params: Params) -> Denoiser:
    """A denoiser of a name of params.yaml, or of a file or folder; nothing in it is executed.

    Raises:
        ValueError: no such thing, or another network.
    """
    folder = MODELS / model
    path = folder if folder.is_dir() else Path(model)
    if not path.exists():
        known = ", ".join(["teacher", *params.students, *params.imports])
        raise ValueError(
            f"need a finished model of {known}, or a checkpoint's file or folder, got {model!r}"
        )
    weights, about = import_checkpoint(path)
    check_architecture(about, params, model)
    denoiser = build_denoiser(params)
    load_weights(denoiser, weights, model)
    return denoiser.eval().requires_grad_(False)


def write(
    folder: Path, images: NDArray[np.uint8], labels: Sequence[int], seeds: Sequence[int]
) -> None:
    """The images (N, C, H, W) as a grid, one by one, and as arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    scale = max(1, SHORTEST // (COLUMNS * images.shape[-1]))
    save(folder / "grid.png", tile(images, min(COLUMNS, len(images)), scale))
    for image, label, seed in zip(images, labels, seeds, strict=True):
        save(folder / f"{seed:06d}-class{label}.png", tile(image[None], 1, 1))
    with atomic_path(folder / "images.npz") as path:
        np.savez(path, images=images, labels=np.array(labels), seeds=np.array(seeds))


def save(path: Path, picture: NDArray[np.uint8]) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
