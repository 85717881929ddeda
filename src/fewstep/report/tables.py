"""Frames as files: table.csv, table.md, table.tex, metrics.json and a CSV for each curve.

These files are in git, so that a clone shows results without a run. They hold no clock and no
machine, and their numbers are rounded (`text.SCORE_DIGITS`): a rerun elsewhere changes few of them.
`rows` is the frame of `frames.rows_frame`, in the order of params.yaml.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from fewstep.files import atomic_path, write_json
from fewstep.report.frames import best_per_nfe, main_loss, other_metrics, records
from fewstep.report.text import (
    COLUMNS,
    CURVE_DIGITS,
    MISSING,
    NUMBERS,
    Row,
    cell,
    measured,
    rounded,
    significant,
)
from fewstep.report.worsening import DISTANCE
from fewstep.training.signs import SIGNS

MEASURED_WITH = (
    *("published", "published_source", "detector_sha256"),
    *("data_sha256", "reference_images", "reference_file.sha256"),
)
"""The hash of the reference itself is not among them: its last digits depend on the machine."""
SHOWN = ("row", "method", "sampler", "steps", "nfe", "guidance_scale", "value")
HEADS = {"nfe": "NFE", "guidance_scale": "guidance", "train_seconds": "seconds"}
WIDTH = 100  # of text in a terminal
PINNED = ("FD-EffLite0", "FID")  # names that stand for one file of weights


def write_table(rows: pd.DataFrame, out_dir: str | os.PathLike[str], caption: str) -> None:
    """Write table.csv, table.md below `caption`, and table.tex.

    The latter two show the columns that fit a terminal's 100, each value with its spread; the
    lowest value among rows of as many network calls is bold. The other metrics are columns of
    table.csv, and a second table of table.md. table.csv also records what rows were measured with,
    because tables of several experiments may meet there.

    Raises:
        ValueError: rows that were measured with another detector or against another reference than
            the first.
    """
    check_comparable(rows)
    _write(Path(out_dir) / "table.csv", csv_frame(rows).to_csv(index=False, lineterminator="\n"))
    text = textwrap.fill(caption, WIDTH, break_long_words=False, break_on_hyphens=False)
    tables = [text, markdown_table(rows), *filter(None, [metrics_table(rows)])]
    _write(Path(out_dir) / "table.md", "\n\n".join(tables) + "\n")
    _write(Path(out_dir) / "table.tex", latex_table(rows))


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_comparable(rows: pd.DataFrame) -> None:
    """Refuse rows whose values do not belong in one table."""
    for key in ("metric", "detector_sha256", "reference_sha256"):
        found = rows[key] if key in rows else pd.Series(dtype=str)
        for name, value in found[found != found.head(1).squeeze()].items():
            raise ValueError(
                f"need one {key} in a table, got {found.iloc[0]} of {rows.index[0]} and {value} of "
                f"{name}; score the rows again (fewstep fid)"
            )


def csv_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of table.csv: the table's, all metrics, and what they were measured with."""
    other = {f"metrics.{name}.value": name for name in other_metrics(rows)}
    known = [name for name in MEASURED_WITH if name in rows]
    columns = [*COLUMNS[:-1], *other, *known, *COLUMNS[-1:]]
    table = rows.reset_index()[columns].rename(columns=other)
    scores = ["value", *other.values()]
    table[scores] = table[scores].map(rounded)
    table["std"] = [rounded(float(std), 2) for std in table["std"]]
    return table


def text_frame(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows as they are shown, in some of `COLUMNS`; a value has its spread behind it."""
    known = rows.reset_index()
    texts = {name: [cell(value, name) for value in known[name]] for name in columns}
    if "value" in texts:
        pairs = zip(known["value"], known["std"], strict=True)
        texts["value"] = [measured(value, std) for value, std in pairs]
    return pd.DataFrame(texts, index=rows.index)


def markdown_table(rows: pd.DataFrame) -> str:
    """Rows as a Markdown table, columns padded, so that it reads well as plain text too."""
    text, best = text_frame(rows, SHOWN), best_per_nfe(rows)
    text.loc[best, "value"] = "**" + text.loc[best, "value"] + "**"
    return _markdown(text.rename(columns=heads(rows)), SHOWN)


def heads(rows: pd.DataFrame) -> dict[str, str]:
    """What stands above columns of these rows, where it is not the column's name."""
    return {**HEADS, "value": rows["metric"].iloc[0]}


def metrics_table(rows: pd.DataFrame) -> str:
    """The other metrics as a Markdown table; their spread is on the page, where there is room."""
    names = other_metrics(rows)
    if not names:
        return ""
    found = {name: rows[f"metrics.{name}.value"] for name in names}
    texts = {name: [measured(value, None) for value in found[name]] for name in names}
    return _markdown(pd.DataFrame({"row": rows.index, **texts}), ["row", *(["value"] * len(names))])


def spreads(rows: pd.DataFrame, metric: str) -> list[str]:
    """Values of a metric with what is known of their spread: `3,774 ± 9`."""
    found = rows.reindex(columns=[f"metrics.{metric}.value", f"metrics.{metric}.std"])
    return [measured(value, std) for value, std in found.itertuples(index=False)]


def _markdown(text: pd.DataFrame, kinds: Sequence[str]) -> str:
    sides = ["right" if kind in NUMBERS else "left" for kind in kinds]
    return text.to_markdown(index=False, disable_numparse=True, colalign=sides)


def latex_table(rows: pd.DataFrame) -> str:
    """Rows as a `tabular` of the package booktabs, to be read in by a paper."""
    text = text_frame(rows, SHOWN).replace(MISSING, "--").rename(columns=heads(rows))
    style = text.style.hide(axis="index").format(escape="latex")
    style = style.format_index(axis="columns", escape="latex")
    best = pd.IndexSlice[best_per_nfe(rows), [heads(rows)["value"]]]
    style = style.map(lambda _: "textbf:--rwrap", subset=best)
    kinds = "".join("r" if name in NUMBERS else "l" for name in SHOWN)
    needs = "% made by `fewstep results-table`; needs \\usepackage{booktabs}\n"
    return needs + style.to_latex(hrules=True, column_format=kinds)


def write_metrics(
    rows: pd.DataFrame, floor: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Write one nested JSON, {metric: {row: value, ..., floor: value}}, for `dvc exp show`.

    One column a row: how a row is sampled stands in params.yaml. The metric carries a short hash of
    what it is against and with which weights: scores of experiments with different references or
    detectors never share a column.

    Raises:
        ValueError: a row called "floor", NaN.
    """
    if "floor" in rows.index:
        raise ValueError("need a row name other than 'floor', got 'floor' (params.yaml: rows)")
    metrics: dict[str, dict[str, float]] = {}
    for row in records(rows):
        metrics.setdefault(_column(row), {})[row["row"]] = rounded(row["value"])
    next(iter(metrics.values()))["floor"] = rounded(floor["value"])
    write_json(path, metrics)


def _column(row: Row) -> str:
    """`FD-EffLite0-1a2b`: the metric, and four digits of a hash of what it is against.

    That is a published file, or as many images of our own data; and the weights, where the
    metric's name does not stand for one file of them. No dots: to DVC they are levels.
    """
    weights = "" if row["metric"] in PINNED else row["detector_sha256"]
    if not isinstance(against := row.get("reference_file.sha256"), str):
        against = f"{row['data_sha256']} {row['reference_images']}"
    return f"{row['metric']}-{sha256(f'{against} {weights}'.encode()).hexdigest()[:4]}"


def write_curves(logs: pd.DataFrame, models: Sequence[str], out_dir: Path) -> None:
    """Each model's main loss and its validation, where it has one, over kimg: for `dvc plots`.

    The signs of mode seeking are further columns beside the distance.
    """
    for folder in ("losses", "validation"):  # outputs of the stage, even if they stay empty
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    own_score = logs["name"].str.match(DISTANCE)
    for model in models:
        own = logs["model"] == model
        loss = logs[own & (logs["name"] == main_loss(model, logs))]
        _write_curve(loss, out_dir / "losses" / f"{model}.csv", "loss")
        if (own & own_score).any():
            signs = {sign: logs[own & (logs["name"] == f"validation/{sign}")] for sign in SIGNS}
            path = out_dir / "validation" / f"{model}.csv"
            _write_curve(logs[own & own_score], path, "distance", signs)


def _write_curve(
    curve: pd.DataFrame, path: Path, column: str, beside: Mapping[str, pd.DataFrame] | None = None
) -> None:
    """A curve over kimg, with those `beside` it that have a value."""
    table = curve[["kimg", "value"]].rename(columns={"value": column})
    for name, other in (beside or {}).items():
        if not other.empty:
            values = other[["kimg", "value"]].rename(columns={"value": name})
            table = table.merge(values, on="kimg", how="left")
    logged = table.columns.drop("kimg")
    table[logged] = table[logged].map(lambda value: rounded(value, CURVE_DIGITS))
    _write(path, table.to_csv(index=False, lineterminator="\n"))


def table_caption(rows: pd.DataFrame, about: Mapping[str, Any]) -> str:
    """The lines that say how to read the table.

    Args:
        about: artifacts/ref-stats.json, of which this needs `reference_images`, real images behind
            the reference (of a published one, those that all metrics but the first are against);
            `reference_file`, `url` and `sha256` of a published reference or None; and `floor`, the
            `value` of `images` real images against `other_images` disjoint ones, or against the
            published reference.
    """
    floor, images = about["floor"], f"{about['reference_images']:,}"
    if (file := about["reference_file"]) is None:
        against = f"{images} real images"
        real = f"{floor['images']:,} images against {floor['other_images']:,} others, is"
    else:
        against = (
            f"the published statistics {file['url'].rpartition('/')[2]} (sha256 "
            f"{file['sha256'][:12]}), all other metrics against {images} images of our own data"
        )
        real = (
            f"{floor['images']:,} images of our own data against these statistics, which may be "
            "of the same images, is"
        )
    return (
        f"{rows['metric'].iloc[0]} (lower is better) against {against}; one image for each seed "
        f"{_seeds(rows)}. Real against real, {real} the floor: {significant(floor['value'])}. "
        "Bold: best at its number of network calls (NFE)."
        + _spread_of(rows)
        + "".join(f" Note: {note}." for note in _notes(rows))
    )


def _notes(rows: pd.DataFrame) -> list[str]:
    """What makes values doubtful, a covariance that is not of full rank say; each note once."""
    return [] if "notes" not in rows else rows["notes"].explode().dropna().unique().tolist()


def _seeds(rows: pd.DataFrame) -> str:
    """`from 0 to 5,999, the same in every row (teacher-heun-35: to 1,999)`, as most rows have."""
    last = rows["first_seed"] + rows["images"] * rows["seed_ranges"] - 1
    usual = last.mode().max()
    others = [f"{name}: to {seed:,}" for name, seed in last[last != usual].items()]
    but = f" ({'; '.join(others)})" if others else ""
    return f"from {rows['first_seed'].iloc[0]:,} to {usual:,}, the same in every row{but}"


def _spread_of(rows: pd.DataFrame) -> str:
    """What `std` is of: the seed ranges, the bootstrap, or either."""
    kinds = set(rows[f"metrics.{rows['metric'].iloc[0]}.std_of"])
    of = {
        "ranges": "over the disjoint seed ranges, of one range's value",
        "resamples": "over resamples of a row's images (bootstrap)",
    }
    known = [text for kind, text in of.items() if kind in kinds]
    if not known:
        return ""
    return f" ±: standard deviation {'; where there is one range, '.join(known)}."
