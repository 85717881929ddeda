"""report.html: all results on one page that needs no network, for a phone as for a large screen."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fewstep.files import atomic_path
from fewstep.report import charts
from fewstep.report.frames import best_per_nfe, other_metrics
from fewstep.report.pictures import Picture
from fewstep.report.tables import heads, spreads, text_frame
from fewstep.report.text import MISSING, NUMBERS, is_missing, significant
from fewstep.report.worsening import worsenings

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_CLASSES = 20
FIRST = ["row", "value", "nfe", "steps"]  # what matters most: a phone shows four columns
LAST = ["sampler", "guidance_scale", "student", "method", "kimg", "train_seconds"]
SECTIONS = {
    "results": "Results",
    "charts": "Distance",
    "samples": "Samples",
    "neighbours": "Nearest training images",
    "classes": "Class by class",
    "training": "Training",
    "published": "Published by others",
    "provenance": "Provenance",
    "configuration": "Configuration",
}


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Args:
        rows, logs: the frames of `frames.rows_frame` and `logs_frame`.
        floor: the score of real images, as in artifacts/ref-stats.json.
        samples: real images first, then those of each row.
        neighbours: for each row a line of samples, and below each its nearest training images.
        provenance: what to say of this run as a whole.
        records: all that is known of each row.
        configuration: the text of params.yaml.
        published: what others published, as in published.csv.
    """

    title: str
    caption: str
    rows: pd.DataFrame
    logs: pd.DataFrame
    floor: Mapping[str, Any]
    samples: Sequence[Picture]
    samples_note: str
    neighbours: Sequence[Picture]
    neighbours_note: str
    provenance: Mapping[str, str]
    records: Mapping[str, Any]
    configuration: str
    published: pd.DataFrame


def write_page(content: Content, path: str | os.PathLike[str]) -> None:
    """Write the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    real, *others = content.samples
    parts = {
        "results": _results(content),
        "charts": _charts(content),
        "samples": _slides(others, content.rows),
        "neighbours": _slides(content.neighbours, content.rows),
        "classes": _classes(content),
        "warnings": _warnings(content.logs, content.rows["metric"].iloc[0]),
        "training": _losses(content.logs),
        "published": _published(content.published),
        "provenance": [
            Column("what", content.provenance),
            Column("which", content.provenance.values(), css="wrap"),
        ],
        "configuration": content.configuration,
    }
    text = template.render(
        content=content,
        cards=_cards(content),
        real=real.slide(),
        sections=[(key, name) for key, name in SECTIONS.items() if parts[key]],
        as_json=partial(json.dumps, indent=2, ensure_ascii=False),
        **parts,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cards(content: Content) -> list[tuple[str, str, str]]:
    """The best value at each number of network calls, and the floor: heading, value, row."""
    best = content.rows.loc[content.rows.groupby("nfe")["value"].idxmin()]
    cards = [
        (f"{nfe} network call{'s' if nfe > 1 else ''}", significant(value), row)
        for row, nfe, value in best[["nfe", "value"]].head(7).itertuples()
    ]
    return [*cards, ("real images", significant(content.floor["value"]), "floor")]


# --- tables -------------------------------------------------------------------------------------


class Column:
    """A column of a table of the page.

    Args:
        texts: what its cells show.
        values: what it is sorted by, missing ones last; None: by the texts.
        marked: the cells in bold.
        shades: opacities of a colour behind the cells.
    """

    def __init__(
        self,
        title: str,
        texts: Iterable[str],
        values: Iterable[object] | None = None,
        css: str = "",
        marked: Sequence[bool] | None = None,
        shades: Sequence[float] | None = None,
    ) -> None:
        self.title, self.texts, self.css = title, list(texts), css
        self.values = None if values is None else ["" if is_missing(v) else v for v in values]
        self.marked, self.shades = marked, shades


def _results(content: Content) -> list[Column]:
    rows, known = content.rows, content.rows.reset_index()
    text = text_frame(rows, [*FIRST, *LAST])
    titles = heads(rows)

    def column(name: str) -> Column:
        css = "number" if name in NUMBERS else ""
        best = rows.index.isin(best_per_nfe(rows)).tolist() if name == "value" else None
        return Column(titles.get(name, name), text[name], known[name], css, best)

    metrics = [
        Column(name, spreads(rows, name), rows[f"metrics.{name}.value"], "number")
        for name in other_metrics(rows)
    ]
    beside = [] if content.published.empty else [Column("published", rows["published"], css="wrap")]
    return [*map(column, FIRST), *metrics, *map(column, LAST), *beside]


def _classes(content: Content) -> dict[str, Any] | None:
    """Distance by row and class, dark where it is large; of many classes the extremes."""
    found = content.rows.filter(regex=r"^classes\.").dropna(how="all")
    found.columns = found.columns.str.removeprefix("classes.")
    if found.empty:
        return None
    note = "Fréchet distance within each class; a stronger colour is worse, on a logarithmic scale."
    if found.shape[1] > SHOWN_CLASSES:
        half = SHOWN_CLASSES // 2
        note += f" The {half} classes drawn best and worst, of {found.shape[1]}."
        order = found.median().sort_values(kind="stable").index
        found = found[[*order[:half], *order[-half:]]]
    if real := content.floor.get("classes"):
        floor = pd.DataFrame(real, ["real images"])
        found = pd.concat([found, floor.reindex(columns=found.columns)])
    shades, columns = _shades(found), [Column("row", found.index)]
    for name, values in found.items():
        texts = [MISSING if is_missing(value) else significant(value) for value in values]
        shade = shades[name].tolist()
        columns.append(Column(f"class {name}", texts, values, "number", shades=shade))
    return {"columns": columns, "note": note}


def _shades(values: pd.DataFrame) -> pd.DataFrame:
    """Opacities from 0 to 0.55, by the logarithm of the values; 0 where there is none."""
    logs = np.log(values.clip(lower=1e-9))
    low, high = np.log(values[values > 0].min().min()), logs.max().max()
    return (0.55 * (logs - low) / max(high - low, 1e-9)).clip(lower=0).fillna(0).round(3)


def _published(found: pd.DataFrame) -> list[Column]:
    if found.empty:
        return []
    return [
        Column("who", found["who"]),
        Column("network calls", found["nfe"].map(str), found["nfe"], "number"),
        Column("FID", found["fid"].map("{:g}".format), found["fid"], "number"),
        Column("note", found["note"]),
        Column("source", found["source"], css="wrap"),
    ]


# --- charts and pictures ------------------------------------------------------------------------


def _charts(content: Content) -> list[dict[str, str]]:
    rows, metric = content.rows, content.rows["metric"].iloc[0]
    found = [
        (
            "network calls",
            charts.distance_by_nfe(rows, content.floor["value"], content.published),
            "Rows of one model and sampler are joined. Lower is better.",
        ),
        (
            "training images",
            charts.validation_by_kimg(content.logs, metric),
            "Validation: fewer images against fewer real ones, hence not the table's values.",
        ),
        ("guidance", charts.distance_by_guidance(rows), "Rows that differ in guidance alone."),
    ]
    return [
        {"name": f"{metric} against {what}", "svg": svg, "caption": caption}
        for what, svg, caption in found
        if svg
    ] + _signs(content.logs)


def _signs(logs: pd.DataFrame) -> list[dict[str, str]]:
    """Charts of what falls, or drifts, when a student gives up some kinds of images."""
    texts = {
        "recall": ("Recall", "Share of real images that lie among the student's, by features."),
        "brightness": ("Brightness", "Mean of all pixels: 0 is black, 1 white."),
        "std_ratio": (
            "Spread of pixels",
            "Standard deviation of a pixel over images, against that of real ones: below 1, the "
            "student's look alike.",
        ),
    }
    return [
        {"name": f"{name} against training images", "svg": svg, "caption": f"Validation. {caption}"}
        for sign, (name, caption) in texts.items()
        if (svg := charts.validation_by_kimg(logs, sign, 1.0 if sign == "std_ratio" else None))
    ]


def _warnings(logs: pd.DataFrame, metric: str) -> list[str]:
    """Of trainings whose validation got worse and worse."""
    scores = logs[logs["name"] == f"validation/{metric}"].groupby("model", sort=False)
    found = {str(model): list(zip(log["nimg"], log["value"], strict=True)) for model, log in scores}
    return [text for model, each in found.items() for text in worsenings(model, each)]


def _losses(logs: pd.DataFrame) -> list[dict[str, str]]:
    shown = logs[logs["name"].str.startswith("loss")].groupby("model", sort=False)
    return [{"name": str(model), "svg": charts.losses(str(model), log)} for model, log in shown]


def _slides(pictures: Sequence[Picture], rows: pd.DataFrame) -> list[dict[str, str]]:
    """Pictures of rows, each model's in the order of its network calls, by sampler and guidance."""
    places = rows.assign(model=pd.factorize(rows["student"])[0])
    order = places.sort_values(["model", "sampler", "guidance_scale", "nfe"]).index.tolist()
    return [p.slide() for p in sorted(pictures, key=lambda picture: order.index(picture.name))]
