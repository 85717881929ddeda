"""`fewstep generate ROW`: the images of a row -> artifacts/samples/ROW.npz."""

from pathlib import Path

import numpy as np

from fewstep.distributed import pick_device
from fewstep.evaluate import generate_images
from fewstep.files import atomic_path, sha256_file, write_json
from fewstep.models import MODELS, load_model
from fewstep.params import Params, Row
from fewstep.progress import progress
from fewstep.sample import nfe

SAMPLES = Path("artifacts/samples")


def run(params: Params, name: str) -> None:
    row, g = row_of(params, name), params.generate
    device = pick_device(params.device)
    denoiser, about = load_model(row.model, params)
    seeds = range(g.first_seed, g.first_seed + g.images)
    with progress(g.images, f"generate {name}") as bar:
        images, labels = generate_images(
            params, row, denoiser.to(device), seeds, device, bar.update
        )
    with atomic_path(SAMPLES / f"{name}.npz") as path:
        np.savez(path, images=images, labels=labels, seeds=np.array(seeds, dtype=np.int64))
    write_json(
        SAMPLES / f"{name}.json",
        {
            "row": name,
            "model": row.model,
            "method": about.get("train", {}).get("method"),
            "kimg": about.get("kimg"),
            "sampler": row.sampler,
            "steps": row.steps,
            "nfe": nfe(row.sampler, row.steps, row.guidance_scale),
            "guidance_scale": row.guidance_scale,
            "images": g.images,
            "first_seed": g.first_seed,
            "labels": g.labels,
            "model_sha256": sha256_file(MODELS / row.model / "model.safetensors"),
        },
    )


def row_of(params: Params, name: str) -> Row:
    """The row of that name.

    Raises:
        ValueError: no such row.
    """
    if name not in params.rows:
        known = ", ".join(params.rows)
        raise ValueError(f"need a row of {known}, got {name!r} (params.yaml: rows)")
    return params.rows[name]
