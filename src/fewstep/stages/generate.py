"""`fewstep generate ROW`: the images of a row -> artifacts/samples/ROW.npz."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import ConditionalDenoise, guided, one_hot
from fewstep.distributed import pick_device
from fewstep.files import atomic_path, sha256_file, write_json
from fewstep.models import MODELS, load_model
from fewstep.params import Params, Row
from fewstep.progress import progress
from fewstep.sample import SeededNoise, nfe, sample, to_uint8

SAMPLES = Path("artifacts/samples")


def run(params: Params, name: str) -> None:
    row, g = row_of(params, name), params.generate
    device = pick_device(params.device)
    denoiser, about = load_model(row.model, params)
    denoise = guided(denoiser.to(device), row.guidance_scale)
    seeds = range(g.first_seed, g.first_seed + g.images)
    images, labels = [], []
    with progress(g.images, f"generate {name}") as bar:
        for start in range(0, g.images, g.batch):
            batch = seeds[start : start + g.batch]
            x, y = sample_row(params, name, denoise, batch, device)
            images.append(to_uint8(x).cpu().numpy())
            labels.append(y.numpy())
            bar.update(len(batch))
    with atomic_path(SAMPLES / f"{name}.npz") as path:
        np.savez(
            path,
            images=np.concatenate(images),
            labels=np.concatenate(labels),
            seeds=np.array(seeds, dtype=np.int64),
        )
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


@torch.no_grad()
def sample_row(
    params: Params,
    name: str,
    denoise: ConditionalDenoise,
    seeds: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The images (B, C, H, W) of a row for these seeds, and their classes, int64 (B,).

    Raises:
        FloatingPointError: an image is not finite.
    """
    row, d, n = params.rows[name], params.data, params.noise
    noise = SeededNoise(seeds, (d.channels, d.resolution, d.resolution))
    latents, drawn = noise(), noise.labels(d.classes)
    balanced = torch.tensor(list(seeds)) % d.classes
    labels = balanced if params.generate.labels == "balanced" else drawn
    x = sample(
        row.sampler,
        denoise,
        noise,
        latents.to(device),
        one_hot(labels, d.classes).to(device),
        row.steps,
        n.sigma_min,
        n.sigma_max,
        n.rho,
        asdict(row.churn) if row.churn else None,
    )
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(f"row {name} gave images that are not finite (model {row.model})")
    return x, labels
