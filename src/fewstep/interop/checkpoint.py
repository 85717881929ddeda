"""Checkpoints of this and other projects as weights of our denoiser, whatever their file format.

Recognised by content, not by name: EDM's pickles and training snapshots, files of `torch.save`
(DMD2's pytorch_model.bin), safetensors (ours, accelerate's), and accelerate's folders.
"""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.files import sha256_file
from fewstep.interop.architecture import architecture
from fewstep.interop.edm_pickle import import_edm_pickle
from fewstep.interop.torch_file import LEGACY_MAGIC, read_torch_file
from fewstep.networks.weights import read_safetensors

_ANCHOR = "model.map_layer0.weight"  # exactly once in every network of EDM
_UNUSED = "model.map_augment.weight"  # for EDM's augmentations, which sampling does not use
_FOLDER = ("model.safetensors", "pytorch_model.bin")  # the generator in accelerate's folders
_INCEPTION = (
    "a feature network is not a denoiser; for FID use the weights of torch-fidelity, "
    "weights-inception-2015-12-05-6726825d.pth (params.yaml: metric)"
)
_OTHER = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
    b"<!DOCTYPE": "an HTML page instead of the file: check the download",
    b"<html": "an HTML page instead of the file: check the download",
}


def import_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of one denoiser in a file or folder, and what is known about them.

    Nothing in the file is executed.

    Returns:
        The state dict under our names (`model.enc....`), on the CPU, in the file's dtypes; and
        format, source and sha256 of the file, tensors and parameters (counts), the architecture
        under EDM's names, left_out (unused tensors and files), and whatever the file itself
        records (nimg, loss, kimg, ...).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file; one that is damaged, claims more than it holds or names
            something that weights do not need; no denoiser in it, or several.
    """
    path = Path(path)
    file = _in_folder(path) if path.is_dir() else path
    try:
        read, form = _reader(file)
        weights, about = read(file)
        weights, left_out = _one_network(weights)
        about = {**about, **architecture(weights)}
    except ValueError as error:
        hint = f"; {_INCEPTION}" if "inception" in f"{file.name} {error}".lower() else ""
        message = str(error) if str(file) in str(error) else f"refused {file}: {error}"
        raise ValueError(message + hint) from error
    if path.is_dir():  # accelerate keeps other networks, optimisers and random states there
        ours = {file.name, "model.json", "log.jsonl"}
        left_out += sorted(p.name for p in path.iterdir() if p.is_file() and p.name not in ours)
    facts = {
        "format": form,
        "source": path.name,
        "sha256": sha256_file(file),
        "tensors": len(weights),
        "parameters": sum(w.numel() for n, w in weights.items() if "resample_filter" not in n),
        "left_out": left_out,
    }
    # model.json is strict JSON, which has no NaN or infinity
    finite = {k: v for k, v in about.items() if not isinstance(v, float) or math.isfinite(v)}
    return weights, finite | facts


def _reader(file: Path) -> tuple[Any, str]:
    """The function that reads a file, and the name of its format."""
    with open(file, "rb") as stream:
        head = stream.read(64)
    if head[8:9] == b"{":
        return _safetensors, "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _state_dict, "torch archive"
    if head.startswith(LEGACY_MAGIC):
        return _state_dict, "torch file before 1.6"
    if head.startswith(b"\x80"):
        return import_edm_pickle, "EDM pickle"
    other = next((text for start, text in _OTHER.items() if head.startswith(start)), None)
    got = other or (f"bytes {head[:12]!r}" if head else "an empty file")
    raise ValueError(f"need an EDM pickle, a file of torch.save, or safetensors, got {got}")


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        weights, about = read_safetensors(file)
        json.dumps(about, indent=2, allow_nan=False)  # as model.json will be written
    except RecursionError as error:
        raise ValueError("its metadata are nested too deeply") from error
    if not isinstance(about, dict):
        raise ValueError(f"need metadata that are a JSON object, got {type(about).__name__}")
    return weights, about


def _state_dict(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = read_torch_file(file)
    if isinstance(content, dict) and "optimizer_state" in content:
        raise ValueError(
            "it is a training state; import the averaged network-snapshot-*.pkl beside it"
        )
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"need a dict of named tensors, got {type(content).__name__}")
    if wrong := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"need a dict of tensors, got something else at {wrong[0][:80]!r}")
    # A shared storage would be written once for each of its tensors.
    if (total := sum(w.nbytes for w in content.values())) > (size := file.stat().st_size):
        raise ValueError(f"its tensors share storages: {total:.4g} bytes in a file of {size}")
    return content, {}


def _one_network(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the one denoiser among `weights`, and the names of the others."""
    ends = [name.removesuffix(_ANCHOR) for name in weights if name.endswith(_ANCHOR)]
    prefixes = sorted(prefix for prefix in ends if not prefix or prefix.endswith("."))
    if len(prefixes) > 1:
        raise ValueError(
            f"need one network, got {len(prefixes)} ({', '.join(p or '/' for p in prefixes[:4])}): "
            "the guidance networks of DMD2; import its generator, model.safetensors or "
            "pytorch_model.bin in the same folder"
        )
    if not prefixes:
        inception = " of Inception" if any("Conv2d_1a_3x3" in name for name in weights) else ""
        raise ValueError(f"need {_ANCHOR}, got tensors{inception} {list(weights)[:3]}")
    inside = f"{prefixes[0]}model."
    network = {n.removeprefix(prefixes[0]): w for n, w in weights.items() if n.startswith(inside)}
    left_out = [name for name in weights if not name.startswith(inside)]
    if network.pop(_UNUSED, None) is not None:
        left_out.append(prefixes[0] + _UNUSED)
    return network, left_out


def _in_folder(folder: Path) -> Path:
    for name in _FOLDER:
        if (folder / name).is_file():
            return folder / name
    names = sorted(item.name for item in folder.iterdir())[:8]
    raise ValueError(
        f"need {' or '.join(_FOLDER)} in {folder}, got {', '.join(names) or 'nothing'}"
    )
