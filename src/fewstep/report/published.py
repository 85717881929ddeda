"""Numbers that others published for ImageNet-64, beside ours and never among them.

Read in the papers and repositories that `source` names; what only a third party quotes is left out.
The frame has the columns of published.csv: who published which FID at how many network calls.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fewstep.report.frames import records

DATASETS = {("imagenet-64x64.npz", 64, 1000): "imagenet64"}
"""By the file of reference statistics that the FIDs are against, resolution and classes: data of
that shape may be anything, and another reference gives other numbers for the same images."""
FILE = Path(__file__).with_name("published.csv")


def published(
    metric: str, resolution: int, classes: int, reference_file: Mapping[str, str] | None
) -> pd.DataFrame:
    """Those that may stand beside ours, in the order of the file: FIDs against the same reference,
    no other metric's values.

    Args:
        reference_file: `url` of published statistics; None: ours are of our own images.
    """
    reference = reference_file["url"].rpartition("/")[2] if reference_file else ""
    dataset = DATASETS.get((reference, resolution, classes)) if metric == "FID" else None
    found = pd.read_csv(FILE, keep_default_na=False, dtype={"fid": float})
    return found[found["dataset"] == dataset]


def with_published(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns `published` and `published_source`, where anything may stand there."""
    if others.empty:
        return rows
    found = [beside(row, others) for row in records(rows)]
    sources = ["; ".join(like["source"]) for like in found]
    return rows.assign(published=[as_text(like) for like in found], published_source=sources)


def beside(row: Mapping[str, Any], others: pd.DataFrame) -> pd.DataFrame:
    """The published numbers of a row's like: the teacher with its sampler, or a student's method,
    at as many network calls."""
    like = others["method"] == row["method"]
    if row["student"] == "teacher":
        like = (others["model"] == "teacher") & (others["sampler"] == row["sampler"])
    return others[like & (others["nfe"] == row["nfe"])]


def as_text(found: pd.DataFrame) -> str:
    """One cell: `1.51 (DMD2: GAN from the start)`, several with semicolons between."""
    return "; ".join(
        f"{p['fid']:g} ({p['who']}{': ' if p['note'] else ''}{p['note']})"
        for p in found.to_dict("records")
    )
