"""Weights of denoisers as files: safetensors and JSON, written atomically and read strictly."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.budgets import HEADER, TENSORS, read_json, regular, within
from fewstep.files import atomic_path, replace_folder, sha256_file, write_json
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.registry import build_denoiser
from fewstep.params import Params
from fewstep.paths import MODELS, SNAPSHOTS
from fewstep.quoting import plain, printable, quoted

FLOATS = ("float32", "float16", "bfloat16", "float64")  # of weights


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
        ValueError: the file is missing, cut short, or not safetensors; a header or metadata that
            pass their budgets.
    """
    with opened(file) as (content, about):
        return {name: content.get_tensor(name) for name in content.keys()}, about  # noqa: SIM118


@contextmanager
def opened(file: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file whose tensors are not read yet, and its `about`.

    Raises:
        ValueError: as `read_safetensors`.
    """
    try:
        with open(regular(file), "rb") as stream:  # the library reads headers of up to 96 MiB
            claimed = int.from_bytes(stream.read(8), "little")
        # A header that is longer than its file is the library's to name.
        if claimed <= os.stat(file).st_size:
            within(claimed, HEADER, "bytes of header")
        with safe_open(file, framework="pt") as content:
            within(len(content.keys()), TENSORS, "tensors")
            text = (content.metadata() or {}).get("fewstep", "{}")
            about = read_json(text, HEADER, "its metadata")
            if not isinstance(about, dict):
                raise ValueError(
                    f"need metadata that are a JSON object, got {type(about).__name__}"
                )
            yield content, about
    except (SafetensorError, OSError, ValueError) as error:
        got = printable(str(error), keep="")
        raise ValueError(f"need a safetensors file at {file}, got: {got}") from error


def load_weights(denoiser: Denoiser, weights: dict[str, Tensor], origin: str | Path) -> None:
    """Copy weights into a denoiser, all of them or, if any name or shape differs, none.

    Raises:
        ValueError: a name or shape differs; names the first ones and the keys to edit. Or weights
            of another type than floating-point numbers.
    """
    wanted = denoiser.state_dict()
    problems = [f"no {name}" for name in wanted if name not in weights]
    problems += [f"unknown {plain(name)}" for name in weights if name not in wanted]
    for name, have in weights.items():
        if name in wanted and have.shape != wanted[name].shape:
            problems.append(f"{name} {tuple(have.shape)}, need {tuple(wanted[name].shape)}")
    if problems:
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise ValueError(
            f"{origin} does not fit the network: {len(problems)} differences: {shown} "
            "(params.yaml: network, data.classes, data.channels)"
        )
    check_types({name: str(w.dtype).removeprefix("torch.") for name, w in weights.items()}, origin)
    denoiser.load_state_dict(weights)


def check_types(dtypes: Mapping[str, str], origin: str | Path) -> None:
    """Refuse integers and the like, which would be copied into floats as if they were weights.

    Args:
        dtypes: of the weights, by their names.
    """
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"need weights of {', '.join(FLOATS)}, got {plain(dtype)} at {quoted(name)} in "
                f"{origin}: quantised, or no weights"
            )


def load_model(name: str, params: Params) -> tuple[Denoiser, dict[str, Any]]:
    """The trained denoiser of that name, frozen, in eval mode on the CPU, and its model.json."""
    file = MODELS / name / "model.safetensors"
    weights, about = read_safetensors(file)
    denoiser = build_denoiser(params)
    load_weights(denoiser, weights, file)
    return denoiser.eval().requires_grad_(False), about
