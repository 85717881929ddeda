"""Numbers that others published for ImageNet-64, beside ours and never among them.

Read in the papers and repositories that `source` names; what only a third party quotes is left out.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Published:
    """A published FID: of `who`, at `nfe` network calls, with what to know about it."""

    model: str
    method: str
    sampler: str
    nfe: int
    fid: float
    who: str
    note: str
    source: str


def comparable(metric: str, resolution: int, classes: int) -> bool:
    """Whether published numbers may stand beside ours: FID on ImageNet at 64x64, nothing else."""
    return (metric, resolution, classes) == ("FID", 64, 1000)


def published() -> list[Published]:
    """All of them, in the order of the file."""
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Published(**{**r, "nfe": int(r["nfe"]), "fid": float(r["fid"])}) for r in rows]


def beside(row: Mapping[str, Any]) -> list[Published]:
    """The published numbers of a row's like: the teacher with its sampler, or a student's method,
    at as many network calls."""
    if row["student"] == "teacher":
        return [
            p
            for p in published()
            if p.model == "teacher" and (p.sampler, p.nfe) == (row["sampler"], row["nfe"])
        ]
    return [p for p in published() if (p.method, p.nfe) == (row["method"], row["nfe"])]


def as_text(found: list[Published]) -> str:
    """One cell: `1.51 (DMD2: GAN from the start)`, several with semicolons between."""
    return "; ".join(f"{p.fid:g} ({p.who}{': ' if p.note else ''}{p.note})" for p in found)
