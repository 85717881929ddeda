"""Denoisers as files: build one from params, save it as safetensors + JSON, load it strictly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.files import atomic_path, write_json
from fewstep.params import Params
from fewstep.performance import allow_tf32, tune
from fewstep.unet import UNet

MODELS = Path("artifacts/models")


def build_denoiser(
    params: Params,
    dropout: float = 0.0,
    label_dropout: float = 0.0,
    dropout_resolutions: tuple[int, ...] | None = None,
) -> Denoiser:
    """A denoiser of params.network with random weights, in train mode, on the CPU."""
    allow_tf32(params.precision == "tf32")
    n, d = params.network, params.data
    unet = UNet(
        d.resolution,
        d.channels,
        d.classes,
        n.model_channels,
        n.channel_mult,
        n.num_blocks,
        n.attn_resolutions,
        dropout,
        label_dropout,
        adm=n.type == "adm",
        dropout_resolutions=dropout_resolutions,
    )
    return tune(Denoiser(unet, n.sigma_data, params.precision), params.performance)


def save_weights(file: Path, weights: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write weights as float32 safetensors with `about` inside, atomically."""
    tensors = {
        name: w.detach().to("cpu", torch.float32).contiguous() for name, w in weights.items()
    }
    with atomic_path(file) as path:
        # one metadata key: safetensors writes several in random order
        save_file(tensors, path, {"fewstep": json.dumps(about)})


def save_model(folder: Path, weights: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write model.safetensors, and model.json, which shows to people what is said in it."""
    save_weights(folder / "model.safetensors", weights, about)
    write_json(folder / "model.json", about)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what `save_model` said about them ({} for other people's files).

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
    """Copy weights into a denoiser; nothing is copied unless every name and shape fits.

    Raises:
        ValueError: what differs, and that params.yaml's network block describes the file.
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
    """The finished denoiser of the teacher or a student, in eval mode on the CPU, and its JSON."""
    file = MODELS / name / "model.safetensors"
    weights, about = read_safetensors(file)
    denoiser = build_denoiser(params)
    load_weights(denoiser, weights, file)
    return denoiser.eval().requires_grad_(False), about
