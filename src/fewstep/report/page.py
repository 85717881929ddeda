"""report.html: all results on one page that needs no network, for a phone as for a large screen."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from fewstep.files import atomic_path
from fewstep.report import charts
from fewstep.report.charts import PALETTE
from fewstep.report.frames import best_first, best_per_nfe, other_metrics, reference_row
from fewstep.report.pictures import Picture
from fewstep.report.tables import heads, spreads, text_frame
from fewstep.report.text import MISSING, NUMBERS, is_missing, significant
from fewstep.report.worsening import worsenings

DARK = ("#7fb2ec", "#f08a72", "#7cc796", "#c3a0e6", "#dcb24a", "#74c5d0")
"""The colours of charts.PALETTE on the dark page."""
TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_CLASSES = 20
FIRST = ["row", "value", "nfe", "steps"]  # what matters most: a phone shows three columns
LAST = ["sampler", "guidance_scale", "student", "method", "kimg", "train_seconds"]
LEAD = (
    "How few network calls does a good image take? {metric} is the distance from real images: "
    "lower is better. NFE are network calls per image."
)
GLOSSARY = {
    r"FID": "Fréchet inception distance: a Fréchet distance on features of Inception-2015",
    r"FD(?:-\w+)?": "Fréchet distance between features of drawn and of real images, each taken as "
    "a Gaussian; lower is better",
    r"KID|KD(?:-\w+)?": "kernel distance between features of drawn and of real images; lower is "
    "better",
    r"NFE": "network calls per image; guidance makes two of one",
    r"kimg": "thousand training images",
    r"precision": "share of drawn images that lie among real ones, by features",
    r"recall": "share of real images that lie among drawn ones, by features",
    r"density": "how many real images lie around a drawn one, against what is expected",
    r"coverage": "share of real images with a drawn one nearby",
    r"memorised": "share of drawn images that are near-duplicates of training images",
    r"guidance": "weight of the class: 1 is off, more makes images more typical of their class",
}
"""Words by a pattern; the page explains each where the pointer rests, and in a list."""
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
        moments: by student, its images as its training goes.
        neighbours: for each row a line of samples, and below each its nearest training images.
        provenance: what to say of this run as a whole.
        records: all that is known of each row.
        configuration: the text of params.yaml.
        published: what others published, as in published.csv.
        class_names: one for each class, or none.
    """

    title: str
    caption: str
    rows: pd.DataFrame
    logs: pd.DataFrame
    floor: Mapping[str, Any]
    samples: Sequence[Picture]
    samples_note: str
    moments: Mapping[str, Picture]
    neighbours: Sequence[Picture]
    neighbours_note: str
    provenance: Mapping[str, str]
    records: Mapping[str, Any]
    configuration: str
    published: pd.DataFrame
    class_names: tuple[str, ...] = ()


def write_page(content: Content, path: str | os.PathLike[str]) -> None:
    """Write the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["explained"] = explained
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    real, *others = content.samples
    best, colours = reference_row(content.rows), _colours(content)
    beside = [picture for picture in others if picture.name == best and len(others) > 1]
    parts = {
        "results": _results(content),
        "charts": _charts(content, colours),
        "samples": _slides([p for p in others if p not in beside], content.rows),
        "neighbours": _slides(content.neighbours, content.rows),
        "classes": _classes(content),
        "warnings": _warnings(content.logs, content.rows["metric"].iloc[0]),
        "training": _trainings(content.logs, content.moments, colours),
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
        lead=LEAD.format(metric=content.rows["metric"].iloc[0]),
        palette=list(enumerate(zip(PALETTE, DARK, strict=True))),
        glossary={_plain(word): text for word, text in GLOSSARY.items()},
        stills=[picture.slide() for picture in (*beside, real)],
        sections=[(key, name) for key, name in SECTIONS.items() if parts[key]],
        as_json=partial(json.dumps, indent=2, ensure_ascii=False),
        **parts,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def explained(text: str) -> Markup:
    """Escaped text whose first use of each word of the glossary explains it."""
    shown = str(escape(text))
    for word, meaning in GLOSSARY.items():
        abbreviation = rf'<abbr title="{escape(meaning)}">\1</abbr>'
        shown = re.sub(rf"(?<![\w-])({word})(?![\w-])(?![^<]*>)", abbreviation, shown, count=1)
    return Markup(shown)


def _plain(pattern: str) -> str:
    """`FD(?:-\\w+)?` as a reader writes it: FD."""
    return re.sub(r"\(\?:.*?\)\?", "", pattern).replace("|", ", ")


def _colours(content: Content) -> dict[str, str]:
    """One colour a model for all charts of the page."""
    return charts.colours_of([*content.rows["student"].unique(), *content.logs["model"].unique()])


def _cards(content: Content) -> list[tuple[str, str, str]]:
    """The best student at each number of network calls against the teacher's best, and the floor:
    heading, value, verdict."""
    rows = content.rows
    best = rows.loc[rows.groupby("nfe")["value"].idxmin()].sort_values("nfe")
    cards, teacher = [], reference_row(rows)
    if teacher is not None:
        best = best[best["student"] != "teacher"]
    for row, nfe, value in best[["nfe", "value"]].head(6).itertuples():
        verdict = f"{row}"
        if teacher is not None:
            ratio, calls = value / rows.at[teacher, "value"], rows.at[teacher, "nfe"]
            verdict += f": {ratio:.2f} × the teacher's {calls}"
        cards.append((f"{nfe} call{'s' if nfe > 1 else ''}", significant(value), verdict))
    if teacher is not None:
        ((_, calls, value),) = rows.loc[[teacher], ["nfe", "value"]].itertuples()
        cards.append((f"{calls} calls", significant(value), f"{teacher}: the teacher's best"))
    floor = significant(content.floor["value"])
    return [*cards, ("real images", floor, "floor: real against other real ones")]


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
    if found.shape[1] < 2:  # of a single class this would be the distance again
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
        head = content.class_names[int(str(name))] if content.class_names else f"class {name}"
        columns.append(Column(head, texts, values, "number", shades=shade))
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


def _charts(content: Content, colours: Mapping[str, str]) -> list[dict[str, str]]:
    rows, metric = content.rows, content.rows["metric"].iloc[0]
    found = [
        (
            "network calls",
            charts.distance_by_nfe(rows, content.floor["value"], content.published, colours),
            "Rows of one model and sampler are joined. Lower and further left is better.",
        ),
        (
            "training images",
            charts.validation_by_kimg(content.logs, metric, colours=colours),
            "Validation: fewer images against fewer real ones, hence not the table's values.",
        ),
        (
            "guidance",
            charts.distance_by_guidance(rows, colours),
            "Rows that differ in guidance alone.",
        ),
    ]
    return [
        {"name": f"{metric} against {what}", "svg": svg, "caption": caption}
        for what, svg, caption in found
        if svg
    ] + _signs(content.logs, colours)


def _signs(logs: pd.DataFrame, colours: Mapping[str, str]) -> list[dict[str, str]]:
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
    levels = {"std_ratio": 1.0}
    return [
        {"name": f"{name} against training images", "svg": svg, "caption": f"Validation. {caption}"}
        for sign, (name, caption) in texts.items()
        if (svg := charts.validation_by_kimg(logs, sign, levels.get(sign), colours))
    ]


def _warnings(logs: pd.DataFrame, metric: str) -> list[str]:
    """Of trainings whose validation got worse and worse."""
    scores = logs[logs["name"] == f"validation/{metric}"].groupby("model", sort=False)
    found = {str(model): list(zip(log["nimg"], log["value"], strict=True)) for model, log in scores}
    return [text for model, each in found.items() for text in worsenings(model, each)]


def _trainings(
    logs: pd.DataFrame, moments: Mapping[str, Picture], colours: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The loss of each training, and its images as it goes."""
    shown = logs[logs["name"].str.startswith("loss")].groupby("model", sort=False)
    return [
        {
            "name": str(model),
            "svg": charts.losses(str(model), log, colours[str(model)]),
            "moments": moments[str(model)].slide() if model in moments else None,
        }
        for model, log in shown
    ]


def _slides(pictures: Sequence[Picture], rows: pd.DataFrame) -> list[dict[str, str]]:
    """Pictures of rows, the best first below the teacher's best."""
    places = {name: place for place, name in enumerate(best_first(rows).index)}
    return [p.slide() for p in sorted(pictures, key=lambda picture: places[picture.name])]
