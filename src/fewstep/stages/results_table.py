"""`fewstep results-table`: all rows -> results/: tables, metrics, sample grids, loss curves."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.lmdb import ImageDataset
from fewstep.files import atomic_path, read_json
from fewstep.models import MODELS
from fewstep.params import Params
from fewstep.report import (
    format_row,
    loss_curves,
    read_log,
    row_caption,
    sample_grid,
    table_caption,
    write_metrics,
    write_table,
)
from fewstep.stages.fid import SCORES
from fewstep.stages.generate import SAMPLES
from fewstep.stages.ref_stats import ABOUT
from fewstep.tracking import Log
from fewstep.train import DATA

RESULTS = Path("results")


def run(params: Params) -> None:
    rows = [load_row(name) for name in params.rows]
    about, g = read_json(ABOUT), params.generate
    seeds = (g.first_seed, g.first_seed + g.images - 1)
    floor = about["floor"]
    caption = table_caption(about["metric"], about["reference_images"], seeds, floor)
    write_table(rows, RESULTS, caption)
    write_metrics(rows, floor, RESULTS / "metrics.json")
    draw_samples(params, rows)
    logs = {name: MODELS / name / "log.jsonl" for name in params.students}
    loss_curves(logs, RESULTS / "losses.png")
    for name, log in logs.items():
        write_loss(log, RESULTS / "losses" / f"{name}.csv")
    print("\n".join(format_row(row) for row in rows))
    print(
        f"floor, real against real: {floor['value']:.2f}\nresults: {RESULTS}/table.md, samples.png"
    )


def load_row(name: str) -> dict[str, Any]:
    """A scored row with the columns of the table."""
    score = read_json(SCORES / f"{name}.json")
    return {**score, "student": score["model"], "train_seconds": train_seconds(score["model"])}


def train_seconds(model: str) -> float | None:
    """Seconds that the training took, all its sessions together; None for a downloaded model."""
    seconds = [
        row["seconds"] for row in Log(MODELS / model / "log.jsonl").rows() if "seconds" in row
    ]
    return seconds[-1] if seconds else None


def draw_samples(params: Params, rows: list[dict[str, Any]]) -> None:
    """One PNG of real images and each row's, same seeds and classes; and one PNG for each row."""
    classes, first = params.data.classes, params.generate.first_seed
    lines = min(5, params.generate.images // classes)
    if lines == 0:
        classes, lines = params.generate.images, 1
    panels: dict[str, np.ndarray] = {"real images": np.empty(0)}  # the first panel
    for row in rows:
        with np.load(SAMPLES / f"{row['row']}.npz") as samples:
            panels[row["row"]] = samples["images"][: classes * lines]
            panels["real images"] = samples["labels"][: classes * lines]
    panels["real images"] = real_images(panels["real images"])
    captions = {row["row"]: row_caption(row) for row in rows}
    last = first + classes * lines - 1
    title = f"Seeds {first} to {last}; one place is one seed and class"
    path = RESULTS / "samples.png"
    sample_grid(panels, captions, path, columns=classes, lines=lines, title=title)
    for name in captions:
        path = RESULTS / "grids" / f"{name}.png"
        sample_grid({name: panels[name]}, captions, path, columns=classes, lines=lines)


def real_images(labels: np.ndarray) -> np.ndarray:
    """A different real image of each label, uint8 (N, C, H, W)."""
    dataset = ImageDataset(DATA)
    places = {label: iter(np.flatnonzero(dataset.labels() == label)) for label in set(labels)}
    return dataset.read(np.array([next(places[label]) for label in labels]))[0]


def write_loss(log: Path, path: Path) -> None:
    """kimg and the student's loss, for `dvc plots`."""
    curves = read_log(log)
    kimg, losses = curves.get("loss") or curves["loss_dm"]
    with atomic_path(path) as target, target.open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kimg", "loss"])
        writer.writerows(zip(kimg.tolist(), losses.tolist(), strict=True))
