"""Checkpoints of this and other projects as weights of our denoiser, whatever their file format.

Recognised by content, not by name: EDM's pickles and training snapshots, files of `torch.save`
(DMD2's pytorch_model.bin), safetensors (ours, accelerate's), and accelerate's folders.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.budgets import WEIGHTS, regular, within
from fewstep.files import sha256_file
from fewstep.interop.architecture import architecture, check_filters
from fewstep.interop.edm_pickle import read_edm_pickle
from fewstep.interop.names import one_network, tensors_in
from fewstep.interop.tensors import Stored
from fewstep.interop.torch_file import LEGACY_MAGIC, read_torch_file
from fewstep.networks.weights import check_types, opened
from fewstep.quoting import listed, plain

_FOLDER = ("model.safetensors", "pytorch_model.bin")  # the generator in accelerate's folders
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.(safetensors|bin)")
_BUFFERS = ("resample_filter", ".freqs", ".phases")  # constants among the weights
_INCEPTION = (
    "a feature network is not a denoiser; for FID use the weights of torch-fidelity, "
    "weights-inception-2015-12-05-6726825d.pth (params.yaml: metric)"
)
_OTHER = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
    b"<!DOCTYPE": "an HTML page instead of the file: check the download",
    b"<html": "an HTML page instead of the file: check the download",
}
_SAFE_DTYPES = {  # and bytes of a number; others are refused by the name that the format gives them
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
Found = tuple[dict[str, Stored], dict[str, Any]]


def import_checkpoint(
    path: Path, network: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of one denoiser in a file or folder, and what is known about them.

    Nothing in the file is executed, and no tensor is read before it is known to belong to a
    network of ours.

    Args:
        network: which one, where a file holds several: the beginning of its tensors' names. None
            takes the averaged one, or DMD2's generator.

    Returns:
        The state dict under our names (`model.enc....`), on the CPU, in the file's dtypes; and
        format, source and sha256 of the file, tensors and parameters (counts), the architecture
        under EDM's names, found_as (the network's name in the file, if it has one), left_out
        (unused tensors and files), and whatever the file itself records (nimg, loss, kimg, ...).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file; one that is damaged, claims more than it holds, names
            something that weights do not need or passes a budget; no denoiser in it, or several.
    """
    path = Path(path)
    files = _in_folder(path) if path.is_dir() else [_whole(regular(path))]
    file = files[0]
    try:
        found, about, form = _read_all(files)
        name, ours, left_out = one_network(found, network)
        check_types({key: stored.dtype for key, stored in ours.items()}, file)
        about = {**about, **architecture(ours)} | ({"found_as": plain(name)} if name else {})
        within(sum(stored.nbytes for stored in ours.values()), WEIGHTS, "bytes of weights")
        weights = {key: stored.load() for key, stored in ours.items()}
        check_filters(weights)
    except ValueError as error:
        hint = f"; {_INCEPTION}" if "inception" in f"{file.name} {error}".lower() else ""
        message = str(error) if str(file) in str(error) else f"refused {file}: {error}"
        raise ValueError(message + hint) from error
    if path.is_dir():  # accelerate keeps other networks, optimisers and random states there
        known = {*(file.name for file in files), "model.json", "log.jsonl"}
        left_out += sorted(p.name for p in path.iterdir() if p.is_file() and p.name not in known)
    facts = {
        "format": form,
        "source": path.name,
        "sha256": _sha256(files),
        "tensors": len(weights),
        "parameters": sum(w.numel() for n, w in weights.items() if not n.endswith(_BUFFERS)),
        "left_out": [plain(name) for name in left_out],
    }
    # model.json is strict JSON, which has no NaN or infinity
    finite = {k: v for k, v in about.items() if not isinstance(v, float) or math.isfinite(v)}
    return weights, finite | facts


def _read_all(files: list[Path]) -> tuple[dict[str, Stored], dict[str, Any], str]:
    """The tensors of all shards, what they say of themselves, and the name of the format."""
    tensors: dict[str, Stored] = {}
    about: dict[str, Any] = {}
    form = ""
    for file in files:
        read, form = _reader(file)
        found, said = read(file)
        if twice := found.keys() & tensors.keys():
            raise ValueError(f"need each tensor in one shard, got {plain(min(twice))} twice")
        tensors |= found
        about |= said
    return tensors, about, form


def _reader(file: Path) -> tuple[Callable[[Path], Found], str]:
    """The function that reads a file, and the name of its format."""
    with open(regular(file), "rb") as stream:
        head = stream.read(64)
    if head[8:9] == b"{":
        return _safetensors, "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _state_dict, "torch archive"
    if head.startswith(LEGACY_MAGIC):
        return _state_dict, "torch file before 1.6"
    if head.startswith(b"\x80"):
        return read_edm_pickle, "EDM pickle"
    other = next((text for start, text in _OTHER.items() if head.startswith(start)), None)
    got = other or (f"bytes {head[:12]!r}" if head else "an empty file")
    raise ValueError(f"need an EDM pickle, a file of torch.save, or safetensors, got {got}")


def _safetensors(file: Path) -> Found:
    with opened(file) as (content, about):
        found = {}
        for name in content.keys():  # noqa: SIM118
            view = content.get_slice(name)
            kind, shape = str(view.get_dtype()), tuple(view.get_shape())
            dtype, size = _SAFE_DTYPES.get(kind, (kind, 1))
            load = partial(_load, file, name)
            found[name] = Stored(dtype, shape, math.prod(shape) * size, load)
    try:
        json.dumps(about, indent=2, allow_nan=False)  # as model.json will be written
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None
    return found, about


def _load(file: Path, name: str) -> Tensor:
    with opened(file) as (content, _):
        return content.get_tensor(name)


def _state_dict(file: Path) -> Found:
    found = tensors_in(read_torch_file(file))
    # A shared storage would be written once for each of its tensors.
    if (total := sum(w.nbytes for w in found.values())) > (size := file.stat().st_size):
        raise ValueError(f"its tensors share storages: {total:.4g} bytes in a file of {size}")
    return found, {}


def _whole(file: Path) -> Path:
    """The file, if it is no shard."""
    if match := _SHARD.fullmatch(file.name):
        raise ValueError(
            f"need a whole checkpoint, got {file}, shard {int(match[2])} of {int(match[3])}: name "
            "the folder that has all of them"
        )
    return file


def _in_folder(folder: Path) -> list[Path]:
    """The files of the one checkpoint in a folder: a single one, or all shards."""
    for name in _FOLDER:
        if (folder / name).is_file():
            return [folder / name]
    names = sorted(item.name for item in folder.iterdir())
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if not shards:
        raise ValueError(
            f"need {' or '.join(_FOLDER)} in {folder}, got {listed(names, 8) or 'nothing'}"
        )
    stem, _, count, suffix = shards[0].groups()
    wanted = [f"{stem}-{i:05d}-of-{count}.{suffix}" for i in range(1, int(count) + 1)]
    if len({match[1] for match in shards}) > 1 or (gone := sorted({*wanted} - {*names})):
        got = f"no {gone[0]}" if gone else "those of several"  # pyright: ignore[reportPossiblyUnboundVariable]
        raise ValueError(f"need all shards of one checkpoint in {folder}, got {got}")
    return [folder / name for name in wanted]


def _sha256(files: list[Path]) -> str:
    """Of the file; of several, that of their sha256 in order."""
    each = [sha256_file(file) for file in files]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
