"""`fewstep results-table`: all rows -> results/: tables, metrics, pictures, and the page."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fewstep.data.lmdb import ImageDataset
from fewstep.files import atomic_path, read_json, write_json
from fewstep.models import MODELS
from fewstep.params import Params, digest
from fewstep.provenance import recall, this_run
from fewstep.report.charts import Curve
from fewstep.report.figures import loss_curves, read_log, sample_grid
from fewstep.report.page import Content, Picture, lines_that_fit, write_page
from fewstep.report.published import Published, as_text, beside, published
from fewstep.report.tables import (
    format_row,
    row_caption,
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
COLUMNS = 10  # of a sample grid, at most


def run(params: Params) -> None:
    about = read_json(ABOUT)
    floor, d = about["floor"], params.data
    others = published(about["metric"], d.resolution, d.classes, about["reference_file"])
    rows = [load_row(name, others) for name in params.rows]
    notes = list(dict.fromkeys(note for row in rows for note in row.get("notes", [])))
    caption = table_caption(rows, about["reference_images"], floor, notes, about["reference_file"])
    write_table(rows, RESULTS, caption)
    write_metrics(rows, floor, RESULTS / "metrics.json")
    pictures = samples_of(params, rows)
    draw_samples(params, pictures)
    logs = {name: MODELS / name / "log.jsonl" for name in params.students}
    loss_curves(logs, RESULTS / "losses.png")
    write_curves(logs)
    runs = provenance(params, rows)
    write_json(RESULTS / "provenance.json", runs)
    content = Content(
        title=f"Few-step samples of {Path(d.source).stem}, {d.resolution}×{d.resolution}",
        caption=caption,
        rows=rows,
        floor=floor,
        samples=pictures,
        samples_note=f"{seeds_shown(params, pictures)} Move the slider through each model's steps.",
        neighbours=neighbours_of(rows, params),
        neighbours_note=neighbours_note(about, params),
        logs={name: read_log(log) for name, log in logs.items()},
        provenance=facts(params, about, rows[0], runs),
        records={row["row"]: record(row, runs) for row in rows},
        configuration=yaml.safe_dump(experiment(params), sort_keys=False, allow_unicode=True),
        published=others,
    )
    write_page(content, RESULTS / "report.html")
    print("\n".join(format_row(row) for row in rows))
    print(f"floor, real against real: {floor['value']:.2f}")
    print(f"results: {RESULTS}/report.html, table.md, samples.png")


def load_row(name: str, others: Sequence[Published] = ()) -> dict[str, Any]:
    """A scored row with the columns of the table, and what `others` published of its like."""
    score = read_json(SCORES / f"{name}.json")
    row = {**score, "student": score["model"], "train_seconds": train_seconds(score["model"])}
    if others:
        row["beside"] = beside(row, others)
        row["published"] = as_text(row["beside"])
        row["published_source"] = "; ".join(p.source for p in row["beside"])
    return row


def train_seconds(model: str) -> float | None:
    """Seconds that the training took, all its sessions together; None for a downloaded model."""
    seconds = [
        row["seconds"] for row in Log(MODELS / model / "log.jsonl").rows() if "seconds" in row
    ]
    return seconds[-1] if seconds else None


# --- pictures -----------------------------------------------------------------------------------


def samples_of(params: Params, rows: list[dict[str, Any]]) -> list[Picture]:
    """Real images, then each row's images of the same seeds and classes."""
    dataset, images = ImageDataset(DATA), params.generate.images
    columns = min(params.data.classes, COLUMNS, images)
    lines = min(lines_that_fit(len(rows) + 1, columns, dataset.shape), images // columns)
    pictures, labels = [], np.empty(0)
    for row in rows:
        with np.load(SAMPLES / f"{row['row']}.npz") as samples:
            shown, labels = (samples[key][: columns * lines] for key in ("images", "labels"))
        pictures.append(Picture(row["row"], row_caption(row), shown, columns))
    real = real_images(dataset, labels)
    return [Picture("real images", "of the same classes", real, columns), *pictures]


def draw_samples(params: Params, pictures: list[Picture]) -> None:
    """One PNG of real images and each row's, same seeds and classes; and one PNG for each row."""
    columns = pictures[0].columns
    lines = len(pictures[0].images) // columns
    panels = {picture.name: picture.images for picture in pictures}
    captions = {picture.name: picture.caption for picture in pictures[1:]}
    title, path = seeds_shown(params, pictures).rstrip("."), RESULTS / "samples.png"
    sample_grid(panels, captions, path, columns=columns, lines=lines, title=title)
    for name in captions:
        path = RESULTS / "grids" / f"{name}.png"
        sample_grid({name: panels[name]}, captions, path, columns=columns, lines=lines)


def seeds_shown(params: Params, pictures: list[Picture]) -> str:
    first = params.generate.first_seed
    last = first + len(pictures[0].images) - 1
    return f"Seeds {first} to {last}; one place is one seed and class."


def real_images(dataset: ImageDataset, labels: np.ndarray) -> np.ndarray:
    """A different real image of each label, uint8 (N, C, H, W)."""
    places = {label: iter(np.flatnonzero(dataset.labels() == label)) for label in set(labels)}
    return dataset.read(np.array([next(places[label]) for label in labels]))[0]


def neighbours_of(rows: list[dict[str, Any]], params: Params) -> list[Picture]:
    """For each row its samples that are nearest to training images, and those below them."""
    dataset, pictures = ImageDataset(DATA), []
    for row in rows:
        if not (near := row.get("neighbours")):
            continue
        with np.load(SAMPLES / f"{row['row']}.npz") as samples:
            lines = [samples["images"][[n["image"] for n in near]]]
        for line in np.array([n["training"] for n in near]).T:
            lines.append(dataset.read(line)[0])
        share = row["metrics"]["memorised"]["value"]
        seeds = ", ".join(str(n["seed"]) for n in near)
        caption = f"{row['nfe']} NFE · {share:.2%} near-duplicates. Seeds {seeds}"
        pictures.append(Picture(row["row"], caption, np.concatenate(lines), len(near)))
    return pictures


def neighbours_note(about: dict[str, Any], params: Params) -> str:
    if (m := params.metric.memorisation) is None:
        return ""
    return (
        "Above, of each class the sample that comes nearest to a training image; below each, its "
        f"{m.k} nearest of {about['looked_through']:,} training images, by features. A "
        f"near-duplicate is as near as {m.expected:.1%} of the training images are to one another: "
        "a share well above that says that training images come back."
    )


def write_curves(logs: dict[str, Path]) -> None:
    """Each student's loss, and its validation where it has one, over kimg: for `dvc plots`."""
    for folder in ("losses", "validation"):  # outputs of the stage, be they empty
        (RESULTS / folder).mkdir(parents=True, exist_ok=True)
    for student, log in logs.items():
        curves = read_log(log)
        write_curve(curves.get("loss") or curves["loss_dm"], RESULTS / "losses", student, "loss")
        for name, curve in curves.items():
            if name.startswith("validation/") and not name.startswith("validation/teacher_"):
                write_curve(curve, RESULTS / "validation", student, "distance")


def write_curve(curve: Curve, folder: Path, student: str, column: str) -> None:
    with atomic_path(folder / f"{student}.csv") as path, path.open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kimg", column])
        writer.writerows(zip(*(values.tolist() for values in curve), strict=True))


# --- provenance ---------------------------------------------------------------------------------


def experiment(params: Params) -> dict[str, Any]:
    """The params that results depend on: neither the device nor where trainings are shown."""
    return {k: v for k, v in params.as_dict().items() if k not in ("device", "tracking", "sweeps")}


def provenance(params: Params, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of this table, each row's images and each score: commit, params, machine, versions, time."""
    names = [row["row"] for row in rows]
    return {
        "params_sha256": digest(experiment(params)),
        "results": this_run(),
        "samples": {name: recall(f"samples/{name}", SAMPLES / f"{name}.npz") for name in names},
        "scores": {name: recall(name, SCORES / f"{name}.json") for name in names},
    }


def facts(
    params: Params, about: dict[str, Any], row: dict[str, Any], runs: dict[str, Any]
) -> dict[str, str]:
    """What the page says of all rows at once."""
    g, now = params.generate, runs["results"]
    machine = now["hardware"]
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    most = max((g.ranges(row) for row in params.rows.values()), key=len)
    ranges = ", ".join(f"{r.start:,} to {r.stop - 1:,}" for r in most)
    return {
        "seeds": f"{ranges}; image i is drawn from its seed alone",
        "classes": {"balanced": "seed modulo classes", "random": "drawn from the seed"}[g.labels],
        "rounding": row["rounding"],
        "precision": params.precision,
        "detector": f"{about['detector']['features']}, sha256 {about['detector_sha256']}",
        "reference": f"{reference_text(about)}, sha256 {row['reference_sha256']}",
        "data": f"{params.data.source}, sha256 of the images {about['data_sha256']}",
        "params": f"sha256 {runs['params_sha256']}",
        "commit": f"{now['commit'] or 'no git'}{' (+: with edits)' if now['commit'] else ''}",
        "machine": f"{machine['cpu']}, {machine['cores']} cores{gpus}, {machine['system']}",
        "versions": ", ".join(f"{name} {v}" for name, v in now["versions"].items()),
        "made": now["time"],
    }


def reference_text(about: dict[str, Any]) -> str:
    """What the first metric is against, and the others."""
    own = f"{about['reference_images']:,} images"
    if (file := about["reference_file"]) is None:
        return own
    return f"{file['url']} of sha256 {file['sha256']}; other metrics {own} of our own data; both"


def record(row: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """All that is known of a row, but for its pictures."""
    left_out = ("neighbours", "classes", "beside", "student")
    known = {name: value for name, value in row.items() if name not in left_out}
    made = {"generated": runs["samples"], "scored": runs["scores"]}
    return {**known, **{what: of[row["row"]] for what, of in made.items()}}
