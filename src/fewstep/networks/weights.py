"""Weights of denoisers as files: safetensors and JSON, written atomically and read strictly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.files import atomic_path, replace_folder, sha256_file, write_json
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.registry import build_denoiser
from fewstep.params import Params
from fewstep.paths import MODELS, SNAPSHOTS


def save_weights(file: Path, weights: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write weights as float32 safetensors with `about` inside, atomically."""
    tensors = {
        name: w.detach().to("cpu", torch.float32).contiguous() for name, w in weights.items()
    }
    with atomic_path(file) as path:
        # a single metadata key, because safetensors writes several in random order
        save_file(tensors, path, {"fewstep": json.dumps(about)})


def save_model(folder: Path, weights: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write model.safetensors with `about` inside, and `about` as model.json for people to read."""
    save_weights(folder / "model.safetensors", weights, about)
    write_json(folder / "model.json", about)


def save_trained(
    name: str,
    weights: Mapping[str, Tensor],
    about: dict[str, Any],
    kept: Mapping[str, nn.Module],
    snapshots: Path,
) -> Path:
    """Write what a training leaves: the model, and its snapshots with the networks it kept.

    The JSON names the sha256 of the kept files: the model lets depend on them what starts from it.
    """
    shas = {}
    for network, module in kept.items():
        file = snapshots / f"{network}.safetensors"
        save_weights(file, module.state_dict(), {"name": name, "kimg": about["kimg"]})
        shas[f"{network}_sha256"] = sha256_file(file)
    replace_folder(snapshots, SNAPSHOTS / name)
    save_model(MODELS / name, weights, {**about, **shas})
    return MODELS / name


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the `about` of `save_weights` ({} in other people's files).

    Raises:
        ValueError: the file is missing, cut short, or not safetensors.
    """
    try:
        with safe_open(file, framework="pt") as f:
            about = json.loads((f.metadata() or {}).get("fewstep", "{}"))
            return {name: f.get_tensor(name) for name in f.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"need a safetensors file at {file}, got: {error}") from error


def load_weights(denoiser: Denoiser, weights: dict[str, Tensor], origin: str | Path) -> None:
    """Copy weights into a denoiser, all of them or, if any name or shape differs, none.

    Raises:
        ValueError: a name or shape differs; names the first ones and the keys to edit.
    """
    wanted = denoiser.state_dict()
    problems = [f"no {name}" for name in wanted if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in wanted]
    for name, have in weights.items():
        if name in wanted and have.shape != wanted[name].shape:
            problems.append(f"{name} {tuple(have.shape)}, need {tuple(wanted[name].shape)}")
    if problems:
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise ValueError(
            f"{origin} does not fit the network: {len(problems)} differences: {shown} "
            "(params.yaml: network, data.classes, data.channels)"
        )
    denoiser.load_state_dict(weights)


def load_model(name: str, params: Params) -> tuple[Denoiser, dict[str, Any]]:
    """The trained denoiser of that name, frozen, in eval mode on the CPU, and its model.json."""
    file = MODELS / name / "model.safetensors"
    weights, about = read_safetensors(file)
    denoiser = build_denoiser(params)
    load_weights(denoiser, weights, file)
    return denoiser.eval().requires_grad_(False), about
