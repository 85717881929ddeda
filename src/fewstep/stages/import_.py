"""`fewstep import FILE`: another project's checkpoint, verified -> FOLDER/model.safetensors."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.load import verify
from fewstep.networks.weights import save_model
from fewstep.params import Params
from fewstep.paths import MODELS

HELP = "turn another project's checkpoint into a model of ours"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="a checkpoint: a file, or a folder saved by accelerate")
    parser.add_argument("--out", type=Path, help="folder; default: a new one in artifacts")


def run(params: Params, file: str, out: Path | None = None) -> None:
    weights, about = import_checkpoint(Path(file))
    print(describe(file, about), flush=True)
    verify(weights, about, params, file)
    folder = out or MODELS / Path(file).stem
    save_model(folder, weights, {**about, "name": folder.name})
    print(f"import: fits and runs in the network of the params; written to {folder}")


def describe(file: str, about: dict[str, Any]) -> str:
    """What the file contains, in a few lines."""
    elsewhere = ("format", "source", "sha256", "left_out")
    lines = [f"{key}: {value}" for key, value in about.items() if key not in elsewhere]
    if left_out := about["left_out"]:
        more = f" and {len(left_out) - 6} more" if len(left_out) > 6 else ""
        lines.append(f"left out: {', '.join(left_out[:6])}{more}")
    return "\n  ".join([f"import: {file}: {about['format']}, sha256 {about['sha256']}", *lines])
