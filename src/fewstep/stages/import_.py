"""`fewstep import FILE`: another project's checkpoint, verified -> FOLDER/model.safetensors."""

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from fewstep.data.lmdb import ImageDataset
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import images_to_denoise, verify
from fewstep.networks.weights import save_model
from fewstep.params import Params
from fewstep.paths import DATA, MODELS
from fewstep.quoting import listed, plain

HELP = "turn another project's checkpoint into a model of ours"
_NAMELESS = ("model", "pytorch_model")  # what accelerate calls every network: its folder tells more


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="a checkpoint: a file, or a folder of accelerate")
    parser.add_argument("--out", type=Path, help="folder; by default a new one in artifacts")
    parser.add_argument("--network", help="of several in the file: how its tensors' names begin")
    parser.add_argument("--force", action="store_true", help="replace what has that name")


def run(
    params: Params,
    file: str,
    out: Path | None = None,
    network: str | None = None,
    force: bool = False,
) -> None:
    """Import a checkpoint, if nothing has its name.

    Args:
        out: the folder; None: in artifacts/models, called as the file.
        network: which one, if the file holds several.
        force: whether what is in the folder may be lost.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name that is taken, or no network that params.yaml describes.
    """
    folder = out or MODELS / name_of(Path(file))
    if not force:
        check_free(folder, params)
    weights, about = import_checkpoint(Path(file), network)
    print(describe(file, about), flush=True)
    print(verify(weights, about, params, file, _known_images(params)), flush=True)
    save_model(folder, weights, {**about, "name": folder.name})
    print(
        f"import: runs in the network of the params, is in {folder}\n{_next(file, folder, about)}"
    )


def name_of(path: Path) -> str:
    """What a file or folder becomes by default: its name without what names cannot have."""
    stem = path.name if path.is_dir() else path.stem
    if stem in _NAMELESS:
        stem = path.absolute().parent.name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "imported"


def check_free(folder: Path, params: Params) -> None:
    """Refuse a folder that has something in it, or belongs to a network of the params.

    Raises:
        ValueError: it is taken.
    """
    ways = "name another folder with --out, or replace it with --force"
    known = ("teacher", *params.students, *params.imports)
    if folder.absolute().parent == MODELS.absolute() and folder.name in known:
        raise ValueError(
            f"need a name that is free, got {folder.name}, a network of params.yaml; {ways}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"need a folder that is new or empty, got {folder}, which is not; {ways}")


def describe(file: str, about: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    network = {
        k: v for k, v in about.items() if k not in ("format", "source", "sha256", "left_out")
    }
    lines = [f"{plain(key)}: {plain(str(value), 200)}" for key, value in network.items()]
    lines = lines[:30] + ["..."] * (len(lines) > 30)
    if left_out := about["left_out"]:
        lines.append(f"left out: {listed(left_out)}")
    return "\n  ".join([f"import: {file}: {about['format']}, sha256 {about['sha256']}", *lines])


def _known_images(params: Params) -> Any:  # noqa: ANN401
    d = params.data
    try:
        dataset = ImageDataset(DATA)
        dataset.check(d.resolution, d.channels, d.classes)
    except ValueError:  # no data yet, or others
        return images_to_denoise(params)
    return images_to_denoise(params, dataset)


def _next(file: str, folder: Path, about: dict[str, Any]) -> str:
    """What can be done with the model now."""
    lines = []
    if folder.absolute().parent == MODELS.absolute():
        lines.append(f"draw images: fewstep sample {folder.name}")
    else:
        lines.append(f"draw images: fewstep sample {folder}")
    if Path(file).is_file():
        block = f"{{ url: {file}, sha256: {about['sha256']} }}"
        lines.append(
            f"measure it: imports: {{ {folder.name}: {block} }} and a row with model: "
            f"{folder.name} (params.yaml)"
        )
    return "\n".join(f"  {line}" for line in lines)
