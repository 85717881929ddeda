"""report.html: all results on one page that needs no network, for a phone as for a large screen."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.files import atomic_path
from fewstep.report import charts
from fewstep.report.figures import tile
from fewstep.report.published import Published, as_text
from fewstep.report.tables import NUMBERS, Row, best_per_step_count, cell, measured, significant

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_CLASSES = 20
PIXELS = 2_500_000  # of all sample grids together: what keeps the page below 5 MB


@dataclass(frozen=True)
class Picture:
    """Images of a row as tiles, and what stands above them."""

    name: str
    caption: str
    images: NDArray[np.uint8]
    columns: int

    def slide(self) -> dict[str, str]:
        """What the template shows."""
        scale = max(1, round(48 / self.images.shape[-1]))
        src = png_uri(tile(self.images, self.columns, scale))
        alt = f"{len(self.images)} images: {self.name}"
        return {"name": self.name, "caption": self.caption, "src": src, "alt": alt}


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Args:
        rows: scored rows, in the order of params.yaml.
        floor: the score of real images, as in artifacts/ref-stats.json.
        samples: real images first, then those of each row.
        neighbours: for each row a line of samples, and below each its nearest training images.
        logs: curves of each training: {student: {name: (kimg, value)}}.
        provenance: what to say of this run as a whole, and of each row.
        configuration: the text of params.yaml.
    """

    title: str
    caption: str
    rows: Sequence[Row]
    floor: Mapping[str, Any]
    samples: Sequence[Picture]
    samples_note: str
    neighbours: Sequence[Picture]
    neighbours_note: str
    logs: Mapping[str, Mapping[str, charts.Curve]]
    provenance: Mapping[str, str]
    records: Mapping[str, Any]
    configuration: str
    published: Sequence[Published] = field(default_factory=tuple)


def write_page(content: Content, path: str | os.PathLike[str]) -> None:
    """Write the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    parts = {
        "title": content.title,
        "caption": content.caption,
        "cards": _cards(content),
        "results": _results(content),
        "charts": _charts(content),
        "samples": _samples(content),
        "neighbours": _neighbours(content),
        "classes": _classes(content),
        "losses": _losses(content),
        "published": _published(content.published),
        "provenance": _provenance(content.provenance),
        "records": [
            {"name": name, "text": json.dumps(record, indent=2, ensure_ascii=False)}
            for name, record in content.records.items()
        ],
        "configuration": content.configuration,
        "footer": "Made by fewstep results-table.",
    }
    with atomic_path(path) as temporary:
        temporary.write_text(template.render(**parts, sections=_sections(parts)), encoding="utf-8")


def _sections(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "results": "Results",
        "charts": "Distance",
        "samples": "Samples",
        "neighbours": "Nearest training images",
        "classes": "Class by class",
        "losses": "Training",
        "published": "Published by others",
        "provenance": "Provenance",
        "configuration": "Configuration",
    }
    return [
        ("training" if key == "losses" else key, name) for key, name in names.items() if parts[key]
    ]


def _cards(content: Content) -> list[dict[str, str]]:
    """The best value at each number of network calls, and the floor."""
    best: dict[int, Row] = {}
    for row in content.rows:
        if row["nfe"] not in best or row["value"] < best[row["nfe"]]["value"]:
            best[row["nfe"]] = row
    cards = [
        {
            "head": f"{nfe} network call{'s' if nfe > 1 else ''}",
            "value": f"{row['value']:.2f}",
            "foot": row["row"],
        }
        for nfe, row in sorted(best.items())
    ]
    floor = {"head": "real images", "value": f"{content.floor['value']:.2f}", "foot": "floor"}
    return [*cards[:7], floor]


# --- tables -------------------------------------------------------------------------------------


def _cell(text: str, sort: object = None, css: str = "", shade: float | None = None) -> dict:
    return {"text": text, "sort": sort, "class": css, "shade": shade}


def _head(text: str, number: bool = False) -> dict[str, Any]:
    return {"text": text, "number": number}


def _results(content: Content) -> dict[str, Any]:
    rows = content.rows
    metrics = [name for name in rows[0].get("metrics", {}) if name != rows[0]["metric"]]
    shown = ["row", "value", "nfe", "steps"]  # what matters first: a phone shows four columns
    split = len(shown)
    shown += ["sampler", "guidance_scale", "student", "method", "kimg", "train_seconds"]
    names = {"value": rows[0]["metric"], "guidance_scale": "guidance", "train_seconds": "seconds"}
    titles = [names.get(c, c) for c in shown]
    head = [_head(t, c in NUMBERS) for t, c in zip(titles, shown, strict=True)]
    head[split:split] = [_head(name, True) for name in metrics]
    if content.published:
        head.append(_head("published"))
    best, lines = best_per_step_count(rows), []
    for row in rows:
        line = [_result(row, c, row["row"] in best) for c in shown]
        line[split:split] = [_metric(row, name) for name in metrics]
        if content.published:
            line.append(_cell(as_text(row["beside"]), css="wrap"))
        lines.append(line)
    return {"head": head, "lines": lines, "note": "Bold: best at its number of steps."}


def _result(row: Row, column: str, bold: bool) -> dict[str, Any]:
    text, value = cell(row, column, bold=False), row[column]
    if column == "value" and row["std"] is not None:
        text = measured(value, row["std"])
    css = " ".join(
        filter(None, ["number" * (column in NUMBERS), "best" * (bold and column == "value")])
    )
    return _cell(text, "" if value is None else value, css)


def _metric(row: Row, name: str) -> dict[str, Any]:
    found = row["metrics"].get(name)
    if found is None:
        return _cell("–", "", "number")
    return _cell(measured(found["value"], found["std"]), found["value"], "number")


def _classes(content: Content) -> dict[str, Any] | None:
    """Distance by row and class, dark where it is large; of many classes the extremes."""
    rows = [row for row in content.rows if row.get("classes")]
    if not rows:
        return None
    names = list(rows[0]["classes"])
    median = {c: float(np.median([row["classes"].get(c, 0) for row in rows])) for c in names}
    note = "Fréchet distance within each class; a stronger colour is worse, on a logarithmic scale."
    if len(names) > SHOWN_CLASSES:
        order = sorted(names, key=lambda c: median[c])
        half = SHOWN_CLASSES // 2
        note += f" The {half} classes drawn best and worst, of {len(names)}."
        names = [*order[:half], *order[-half:]]
    lines = [(row["row"], row["classes"]) for row in rows]
    if content.floor.get("classes"):
        lines.append(("real images", content.floor["classes"]))
    values = [by.get(c) for _, by in lines for c in names if by.get(c)]
    low, high = np.log(min(values)), np.log(max(values))
    table = [
        [_cell(name, name), *(_class_cell(by.get(c), low, high) for c in names)]
        for name, by in lines
    ]
    head = [_head("row"), *(_head(f"class {c}", True) for c in names)]
    return {"head": head, "lines": table, "note": note}


def _class_cell(value: float | None, low: float, high: float) -> dict[str, Any]:
    if value is None:
        return _cell("–", "", "number")
    shade = 0.55 * (np.log(max(value, 1e-9)) - low) / max(high - low, 1e-9)
    return _cell(significant(value), value, "number", round(max(float(shade), 0), 3))


def _published(found: Sequence[Published]) -> dict[str, Any] | None:
    if not found:
        return None
    head = [_head("who"), _head("network calls", True), _head("FID", True), _head("note")]
    lines = [
        [
            _cell(p.who),
            _cell(str(p.nfe), p.nfe, "number"),
            _cell(f"{p.fid:g}", p.fid, "number"),
            _cell(p.note),
            _cell(p.source, css="wrap"),
        ]
        for p in found
    ]
    return {"head": [*head, _head("source")], "lines": lines}


def _provenance(facts: Mapping[str, str]) -> dict[str, Any]:
    lines = [[_cell(name), _cell(text, css="wrap")] for name, text in facts.items()]
    return {"head": [_head("what"), _head("which")], "lines": lines}


# --- charts and pictures ------------------------------------------------------------------------


def _charts(content: Content) -> list[dict[str, str]]:
    rows = content.rows
    metric, floor = rows[0]["metric"], content.floor["value"]
    found = [
        {
            "name": f"{metric} against network calls",
            "svg": charts.distance_by_nfe(rows, floor, content.published),
            "caption": "Rows of one model and sampler are joined. Lower is better.",
        }
    ]
    curves = {
        name: log[f"validation/{metric}"]
        for name, log in content.logs.items()
        if f"validation/{metric}" in log
    }
    if (svg := charts.distance_by_kimg(curves, metric)) is not None:
        caption = "Validation: fewer images against fewer real ones, hence not the table's values."
        name = f"{metric} against training images"
        found.append({"name": name, "svg": svg, "caption": caption})
    if (svg := charts.distance_by_guidance(rows)) is not None:
        name = f"{metric} against guidance"
        found.append({"name": name, "svg": svg, "caption": "Rows that differ in guidance alone."})
    return found


def _losses(content: Content) -> list[dict[str, str]]:
    main = {
        student: {name: curve for name, curve in log.items() if name.startswith("loss")}
        for student, log in content.logs.items()
    }
    return [
        {"name": student, "svg": charts.losses(student, curves)}
        for student, curves in main.items()
        if curves
    ]


def _samples(content: Content) -> dict[str, Any]:
    real, *others = content.samples
    slides = [picture.slide() for picture in _over_steps(others, content.rows)]
    return {"real": real.slide(), "slides": slides, "note": content.samples_note}


def _neighbours(content: Content) -> dict[str, Any] | None:
    if not content.neighbours:
        return None
    slides = [picture.slide() for picture in _over_steps(content.neighbours, content.rows)]
    return {"slides": slides, "note": content.neighbours_note}


def _over_steps(pictures: Sequence[Picture], rows: Sequence[Row]) -> list[Picture]:
    """Pictures of rows, each model's in the order of its network calls, by sampler and guidance."""
    models = list(dict.fromkeys(row["student"] for row in rows))
    places = {
        row["row"]: (
            models.index(row["student"]), row["sampler"], row["guidance_scale"], row["nfe"]
        )
        for row in rows
    }  # fmt: skip
    return sorted(pictures, key=lambda picture: places[picture.name])


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as an address that holds it."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if (pixels[..., :1] == pixels).all():
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def lines_that_fit(pictures: int, columns: int, shape: tuple[int, ...], most: int = 5) -> int:
    """Lines of every sample grid so that all together stay within the page's size; at least 1."""
    scale = max(1, round(48 / shape[-1]))
    bytes_a_line = pictures * columns * int(np.prod(shape)) * (1 if scale == 1 else 1.2)
    return max(1, min(most, int(PIXELS / bytes_a_line)))
