"""Numbers that others published for ImageNet-64 and CIFAR-10, beside ours and never among them.

Read in the papers and repositories that `source` names; what only a third party quotes is left out.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASETS = {(64, 1000): "imagenet64", (32, 10): "cifar10"}  # by resolution and classes
FILE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Published:
    """A published FID: of `who`, at `nfe` network calls, with what to know about it."""

    dataset: str
    model: str
    method: str
    sampler: str
    nfe: int
    fid: float
    who: str
    note: str
    source: str


def published(metric: str, resolution: int, classes: int) -> list[Published]:
    """Those that may stand beside ours, in the order of the file: FIDs of the same data, no other
    metric's values."""
    dataset = DATASETS.get((resolution, classes)) if metric == "FID" else None
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    return [Published(**{**r, "nfe": int(r["nfe"]), "fid": float(r["fid"])}) for r in rows]


def beside(row: Mapping[str, Any], others: Sequence[Published]) -> list[Published]:
    """The published numbers of a row's like: the teacher with its sampler, or a student's method,
    at as many network calls."""
    if row["student"] == "teacher":
        return [
            p
            for p in others
            if p.model == "teacher" and (p.sampler, p.nfe) == (row["sampler"], row["nfe"])
        ]
    return [p for p in others if (p.method, p.nfe) == (row["method"], row["nfe"])]


def as_text(found: list[Published]) -> str:
    """One cell: `1.51 (DMD2: GAN from the start)`, several with semicolons between."""
    return "; ".join(f"{p.fid:g} ({p.who}{': ' if p.note else ''}{p.note})" for p in found)
