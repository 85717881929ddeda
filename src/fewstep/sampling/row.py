"""The images of a row of the results table, sampled so that an interrupted row can resume."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fewstep.arrays import save_arrays
from fewstep.code import identity
from fewstep.distributed import Rank, barrier
from fewstep.files import sha256_file, write_json
from fewstep.networks.compute import accelerate
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.weights import load_model
from fewstep.params import Params, Row, digest
from fewstep.paths import MODELS, SAMPLES, SCRATCH
from fewstep.progress import progress
from fewstep.sampling.batches import batches, compile_once, generate_batches, seed_ranges
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import nfe

ROUNDING = "uint8(clip(127.5 x + 128, 0, 255)), truncated"  # fewstep.theory.sample.to_uint8


def draw_row(name: str, params: Params, rank: Rank) -> None:
    """Write artifacts/samples/<name>.npz and, beside it, a .json about how it was made.

    A batch is always sampled by one process, so the images are the same on any number of GPUs.

    Raises:
        ValueError: no such row, or its model is missing.
        FloatingPointError: an image is not finite.
    """
    row, g = row_of(params, name), params.generate
    parts = [part for seeds in seed_ranges(g, row) for part in batches(seeds, g.batch)]
    denoiser, about = load_model(row.model, params)
    folder = SCRATCH / "samples" / name / fingerprint(params, row, rank.device)
    denoiser = accelerate(denoiser.to(rank.device), params.performance, frozen=True)
    grid = Schedule.of_model(about, params.noise)
    compile_once(denoiser, params, row, len(parts[0]), rank)
    sample_parts(params, row, denoiser, grid, parts, folder, rank, f"generate {name}")
    barrier(rank)
    if rank.first:
        collect(folder, parts, SAMPLES / f"{name}.npz")
        write_json(SAMPLES / f"{name}.json", {"row": name, **protocol(params, row, about)})
        shutil.rmtree(SCRATCH / "samples" / name)


def sample_parts(
    params: Params,
    row: Row,
    denoiser: Denoiser,
    grid: Schedule,
    parts: Sequence[range],
    folder: Path,
    rank: Rank,
    desc: str,
) -> None:
    """Sample this rank's share of the batches, except those that an earlier run finished."""
    mine = parts[rank.index :: rank.world]
    missing = [part for part in mine if not _file(folder, part).exists()]
    total, todo = sum(map(len, mine)), sum(map(len, missing))
    with progress(total, desc, initial=total - todo, silent=not rank.first) as bar:
        made = generate_batches(params, row, denoiser, grid, missing, rank.device)
        for part, (images, labels) in zip(missing, made, strict=True):
            save_arrays(_file(folder, part), {"images": images, "labels": labels})
            bar.update(len(part))


def collect(folder: Path, parts: Sequence[range], out: Path) -> None:
    """Join all batches in one file: images, labels and seeds, in the order of the seeds."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts:
        with np.load(_file(folder, part)) as arrays:
            found.append((arrays["images"], arrays["labels"]))
    images, labels = (np.concatenate(each) for each in zip(*found, strict=True))
    seeds = np.concatenate([np.array(part, dtype=np.int64) for part in parts])
    save_arrays(out, {"images": images, "labels": labels, "seeds": seeds})


def _file(folder: Path, part: range) -> Path:
    return folder / f"{part.start}-{part.stop}.npz"


def fingerprint(params: Params, row: Row, device: torch.device) -> str:
    """Hash of all that decides an image, apart from its seed; names the folder of half a row.

    Batches of other code, another torch or another device are never mixed: they may round apart.
    """
    machine = {"torch": torch.__version__, "device": device.type}
    return digest({**origin(params, row), "code": identity("generate"), **machine})[:16]


def origin(params: Params, row: Row) -> dict[str, str]:
    """Hashes of the model and of the params that a row's images depend on."""
    keys = ("generate", "network", "noise", "precision")
    return {
        "model_sha256": sha256_file(MODELS / row.model / "model.safetensors"),
        "params_sha256": digest({"row": row, **{key: getattr(params, key) for key in keys}}),
    }


def protocol(params: Params, row: Row, about: dict) -> dict:
    """How a row's images are made, as recorded with its results.

    Args:
        about: the model.json of its model; an imported or downloaded one has no `train`.
    """
    g, train = params.generate, about.get("train", {})
    return {
        "model": row.model,
        "method": train.get("method"),
        "kimg": about.get("kimg"),
        "ema": train.get("ema", about.get("ema")),
        "sampler": row.sampler,
        "steps": row.steps,
        **vars(Schedule.of_model(about, params.noise)),
        "nfe": nfe(row.sampler, row.steps, row.guidance_scale),
        "guidance_scale": row.guidance_scale,
        "churn": row.churn and vars(row.churn),
        "images": g.images,
        "first_seed": g.first_seed,
        "seed_ranges": len(seed_ranges(g, row)),
        "labels": g.labels,
        "rounding": ROUNDING,
        "precision": params.precision,
        **origin(params, row),
    }


def row_of(params: Params, name: str) -> Row:
    """The row with that name.

    Raises:
        ValueError: there is no such row.
    """
    if name not in params.rows:
        known = ", ".join(params.rows)
        raise ValueError(f"need a row of {known}, got {name!r} (params.yaml: rows)")
    return params.rows[name]
