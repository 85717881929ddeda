"""Scored rows for tests of the report, as artifacts/scores holds them."""

from pathlib import Path
from typing import Any

import pandas as pd

from fewstep.report.frames import frame_of
from fewstep.training.log import Log

FLOOR = {"value": 2.41, "images": 2000, "other_images": 8000}
ABOUT = {"floor": FLOOR, "reference_images": 10_000, "reference_file": None}


def row(name: str, steps: int, value: float, **changes: object) -> dict[str, Any]:
    """A score of a consistency student, with the columns that `rows_frame` adds."""
    return {
        "row": name,
        "student": "cd",
        "method": "consistency",
        "sampler": "ddim",
        "steps": steps,
        "nfe": steps,
        "guidance_scale": 1.0,
        "metric": "FD-EffLite0",
        "value": value,
        "std": 0.25,
        "metrics": {"FD-EffLite0": {"value": value, "std": 0.25, "std_of": "resamples"}},
        "images": 2000,
        "first_seed": 0,
        "detector_sha256": "d" * 64,
        "data_sha256": "da7a" * 16,
        "reference_file": None,
        "reference_images": 10_000,
        "seed_ranges": 1,
        "kimg": 48.0,
        "train_seconds": 288.4,
    } | changes


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return frame_of(rows)


def write_log(folder: Path, *rows: dict[str, object], file: str = "log.jsonl") -> None:
    """The log of a model in its folder, or another file of rows like it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).touch()
    for row in rows:
        Log(folder / file).write(row)
