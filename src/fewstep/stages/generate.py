"""`fewstep generate ROW`: the images of a row -> artifacts/samples/ROW.npz."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fewstep.checkpoint import forget_finished
from fewstep.denoiser import Denoiser
from fewstep.distributed import Rank, barrier
from fewstep.evaluate import batches, generate_batches
from fewstep.files import atomic_path, sha256_file, write_json
from fewstep.launch import ranks, several_gpus
from fewstep.models import MODELS, load_model
from fewstep.params import Params, Row, digest
from fewstep.performance import accelerate
from fewstep.progress import progress
from fewstep.provenance import remember
from fewstep.sample import nfe

SAMPLES = Path("artifacts/samples")
SCRATCH = Path("scratch/samples")
ROUNDING = "uint8(clip(127.5 x + 128, 0, 255)), truncated"  # fewstep.sample.to_uint8
CODE = ("denoiser", "evaluate", "noise", "norms", "sample", "solve", "unet")  # what decides images


def run(params: Params, name: str) -> None:
    """Sample a row, a batch a file, so that an interrupted row goes on where it stopped.

    Every batch is sampled by one process, whole: the images are the same on any number of GPUs.
    """
    row = row_of(params, name)
    parts = [
        part for r in params.generate.ranges(row) for part in batches(r, params.generate.batch)
    ]
    with ranks(params.device, several_gpus(params.device)) as rank:
        denoiser, about = load_model(row.model, params)
        folder = SCRATCH / name / fingerprint(params, row, rank.device)
        denoiser = accelerate(denoiser.to(rank.device), params.performance, frozen=True)
        sample_parts(params, row, denoiser, parts, folder, rank, f"generate {name}")
        barrier(rank)
        if rank.first:
            collect(folder, parts, SAMPLES / f"{name}.npz")
            write_json(SAMPLES / f"{name}.json", {"row": name, **protocol(params, row, about)})
            remember(f"samples/{name}", SAMPLES / f"{name}.npz")
            shutil.rmtree(SCRATCH / name)
            forget_finished(row.model)


def sample_parts(
    params: Params,
    row: Row,
    denoiser: Denoiser,
    parts: Sequence[range],
    folder: Path,
    rank: Rank,
    desc: str,
) -> None:
    """Sample this rank's share of the batches, but for those that an earlier run left."""
    mine = parts[rank.index :: rank.world]
    missing = [part for part in mine if not _file(folder, part).exists()]
    total, todo = sum(map(len, mine)), sum(map(len, missing))
    with progress(total, desc, initial=total - todo, silent=not rank.first) as bar:
        made = generate_batches(params, row, denoiser, missing, rank.device)
        for part, (images, labels) in zip(missing, made, strict=True):
            with atomic_path(_file(folder, part)) as path:
                np.savez(path, images=images, labels=labels)
            bar.update(len(part))


def collect(folder: Path, parts: Sequence[range], out: Path) -> None:
    """One file of all batches: images, labels and seeds, in the order of the seeds."""
    found: dict[str, list[np.ndarray]] = {"images": [], "labels": []}
    for part in parts:
        with np.load(_file(folder, part)) as arrays:
            for name, rows in found.items():
                rows.append(arrays[name])
    images, labels = (np.concatenate(found[name]) for name in ("images", "labels"))
    seeds = np.concatenate([np.array(part, dtype=np.int64) for part in parts])
    with atomic_path(out) as path:
        np.savez(path, images=images, labels=labels, seeds=seeds)


def _file(folder: Path, part: range) -> Path:
    return folder / f"{part.start}-{part.stop}.npz"


def fingerprint(params: Params, row: Row, device: torch.device) -> str:
    """Hash of all that decides an image beside its seed: half a row of another is never used."""
    code = hashlib.sha256()
    for module in CODE:
        code.update((Path(__file__).parents[1] / f"{module}.py").read_bytes())
    return digest(
        {
            "params": conditions(params, row),
            "model": sha256_file(MODELS / row.model / "model.safetensors"),
            "code": code.hexdigest(),
            "torch": torch.__version__,
            "device": device.type,
        }
    )[:16]


def conditions(params: Params, row: Row) -> dict[str, object]:
    """The params that a row's images depend on."""
    return {
        "row": row,
        "generate": params.generate,
        "network": params.network,
        "noise": params.noise,
        "precision": params.precision,
    }


def protocol(params: Params, row: Row, about: dict) -> dict:
    """What a result says about how its images came to be."""
    g, train = params.generate, about.get("train", {})
    return {
        "model": row.model,
        "method": train.get("method"),
        "kimg": about.get("kimg"),
        "ema": train.get("ema", about.get("ema")),
        "sampler": row.sampler,
        "steps": row.steps,
        "nfe": nfe(row.sampler, row.steps, row.guidance_scale),
        "guidance_scale": row.guidance_scale,
        "churn": None if row.churn is None else vars(row.churn),
        "images": g.images,
        "first_seed": g.first_seed,
        "seed_ranges": len(g.ranges(row)),
        "labels": g.labels,
        "rounding": ROUNDING,
        "precision": params.precision,
        "model_sha256": sha256_file(MODELS / row.model / "model.safetensors"),
        "params_sha256": digest(conditions(params, row)),
    }


def row_of(params: Params, name: str) -> Row:
    """The row of that name.

    Raises:
        ValueError: no such row.
    """
    if name not in params.rows:
        known = ", ".join(params.rows)
        raise ValueError(f"need a row of {known}, got {name!r} (params.yaml: rows)")
    return params.rows[name]
