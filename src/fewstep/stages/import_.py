"""`fewstep import FILE`: another project's checkpoint, verified -> FOLDER/model.safetensors."""

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml

from fewstep.data.lmdb import ImageDataset
from fewstep.files import atomic_path
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import images_to_denoise, verify
from fewstep.networks.weights import save_model
from fewstep.params import Params, ParamsError, load_params
from fewstep.params.editing import Text
from fewstep.paths import DATA, MODELS, SNAPSHOTS
from fewstep.quoting import listed, plain

HELP = "turn another project's checkpoint into a model of ours, named in params.yaml"
WRITES_PARAMS = True  # adds to `imports`
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
    path: str | None = None,
) -> None:
    """Import a checkpoint, if nothing has its name, and add it to the params' `imports`.

    From there the pipeline knows it: as the model of a row, and as what a student starts from.

    Args:
        out: the folder; None: in artifacts/models, called as the file. Only there it has a name.
        network: which one, if the file holds several.
        force: whether what is in the folder may be lost.
        path: the params file; None leaves it as it is.

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
    named = folder.absolute().parent == MODELS.absolute()
    own = ("teacher", *params.students)  # --force may replace even those
    again = Path(file).resolve() == folder.resolve()
    if named and path is not None and folder.name not in own and not again:
        block = {"url": file, "sha256": about["sha256"]} | ({"network": network} if network else {})
        record(Path(path), folder.name, block)
    save_model(folder, weights, {**about, "name": folder.name})
    if named:  # an output of `download-model`, as if that had made it
        (folder / "log.jsonl").touch()
        (SNAPSHOTS / folder.name).mkdir(parents=True, exist_ok=True)
    print(
        f"import: runs in the network of the params, is in {folder}\n{_next(file, folder, about)}"
    )


def record(path: Path, name: str, block: dict[str, str]) -> None:
    """Add an entry to the `imports` of a params file; every other byte stays.

    Raises:
        ParamsError: such a file would be refused, for example because of the name.
    """
    edited = with_import(path.read_text(encoding="utf-8"), name, block)
    with atomic_path(path) as temporary:
        temporary.write_text(edited, encoding="utf-8")
        try:
            load_params(temporary)
        except ParamsError as error:
            raise ParamsError(str(error).replace(str(temporary), str(path))) from None
    print(f"import: added imports.{name} to {path}")


def with_import(text: str, name: str, block: dict[str, str]) -> str:
    """A params file in which `imports` has this entry, in place of one of the same name."""
    line = f"  {name}: {yaml.safe_dump(block, default_flow_style=True, width=10_000).strip()}\n"
    params = Text(text)
    if ("imports", name) in params.paths():
        params.replace(("imports", name), line)
    elif any(path[:1] == ("imports",) and len(path) == 2 for path in params.paths()):
        params.replace(("imports",), params.block(("imports",)) + line)
    else:
        params.replace(("imports",), f"imports:\n{line}")
    return params.edited()


def name_of(path: Path) -> str:
    """What a file or folder becomes by default: its name without what names cannot have."""
    stem = path.name if path.is_dir() else path.stem
    if stem in _NAMELESS:
        stem = path.absolute().parent.name
    return re.sub(r"[^a-z0-9-]+", "-", stem.lower()).strip("-") or "imported"


def taken(place: Path) -> bool:
    """Whether a file is there, or a folder with something in it."""
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


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
    if taken(folder):
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
    if folder.absolute().parent == MODELS.absolute():
        row = {"model": folder.name, "sampler": "heun", "steps": 18, "guidance_scale": 1.0}
        said = about.get("sampling") or {}
        row |= {key: said[key] for key in ("sampler", "steps") if key in said}
        line = ", ".join(f"{key}: {value}" for key, value in row.items())
        lines.append(f"measure it: rows: {folder.name}: {{ {line} }} (params.yaml)")
        lines.append(f"start from it: students.<name>.init_from: {folder.name} (params.yaml)")
    return "\n".join(f"  {line}" for line in lines)
