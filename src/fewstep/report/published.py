"""Numbers that others published for ImageNet-64, beside ours and never among them.

Read in the papers and repositories that `source` names; what only a third party quotes is left out.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASETS = {("imagenet-64x64.npz", 64, 1000): "imagenet64"}
"""By the file of reference statistics that the FIDs are against, resolution and classes: data of
that shape may be anything, and another reference gives other numbers for the same images."""
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


def published(
    metric: str, resolution: int, classes: int, reference_file: Mapping[str, str] | None
) -> list[Published]:
    """Those that may stand beside ours, in the order of the file: FIDs against the same reference,
    no other metric's values.

    Args:
        reference_file: `url` of published statistics; None: ours are of our own images.
    """
    reference = reference_file["url"].rpartition("/")[2] if reference_file else ""
    dataset = DATASETS.get((reference, resolution, classes)) if metric == "FID" else None
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
