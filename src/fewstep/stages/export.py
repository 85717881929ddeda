"""`fewstep export NAME --to FORMAT`: a model for other programs -> a new file or folder."""

import re
from argparse import ArgumentParser
from pathlib import Path

from fewstep import export
from fewstep.export.order import UNSTATED, Order
from fewstep.model import load
from fewstep.paths import EXPORTS
from fewstep.quoting import quoted
from fewstep.stages.import_ import name_of, taken
from fewstep.stages.sample import place_of

HELP = "write a model for other programs: ONNX, torch.export, diffusers, a hub folder"
TAKES_PATH = True  # all that is needed is in the model's file


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a name in artifacts/models, or a checkpoint")
    parser.add_argument("--to", required=True, choices=export.names(), help="the format")
    parser.add_argument("--steps", type=int, help="default: as many as it was trained for")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; default: 1, off")
    parser.add_argument("--sampler", help="such as heun or ddim; default: its method's")
    parser.add_argument("--license", help="of the weights, such as cc-by-4.0; default: not stated")
    parser.add_argument("--sigma-data", type=float, help="for a checkpoint that does not say")
    parser.add_argument("--out", type=Path, help="file or folder; default: in artifacts/export")


def run(
    params: str,
    model: str,
    to: str,
    steps: int | None = None,
    guidance: float = 1.0,
    sampler: str | None = None,
    license: str | None = None,
    sigma_data: float | None = None,
    out: Path | None = None,
) -> None:
    """Export a model.

    Args:
        params: the path of params.yaml, which is not read.
        model: a name in artifacts/models, or the file or folder of a checkpoint.
        to: one of `export.names()`.
        steps, sampler: None for those that the model says it was trained for.
        license: of the weights; nothing but the person who exports them can know it.
        out: None: in artifacts/export, called as the model and the format.

    Raises:
        FileNotFoundError: no such model.
        ValueError: one that cannot be sampled so, a missing package, or a place that is taken.
    """
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise ValueError(f"need an identifier such as cc-by-4.0, got {quoted(license)} (--license)")
    form, source = export.find(to), place_of(model)
    name = source.name if "@" in source.name else name_of(source)
    path = out or EXPORTS / f"{name}-{to}{form.SUFFIX}"
    if taken(path):
        raise ValueError(f"need a place that is free, got {path}; remove it, or use --out")
    student = load(source, device="cpu", sigma_data=sigma_data)
    order = Order(student, student.row(sampler, steps, guidance), source, license)
    form.write(order, path)
    row = order.row
    print(f"export: {model} for {to}, {row.sampler}, {row.steps} steps, in {path}")
    print(f"  licence of the weights: {license or UNSTATED}; docs/api.md tells what binds them")
