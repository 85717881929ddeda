"""Frames as files: table.csv, table.md, table.tex, metrics.json and a CSV for each curve.

`rows` is the frame of `frames.rows_frame`, in the order of params.yaml.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fewstep.files import atomic_path, write_json
from fewstep.report.frames import best_per_step_count, main_loss, other_metrics, records
from fewstep.report.text import COLUMNS, MISSING, NUMBERS, Row, cell, measured
from fewstep.report.worsening import DISTANCE
from fewstep.training.signs import SIGNS

MEASURED_WITH = ("published", "published_source", "detector_sha256", "reference_sha256")
PINNED = ("FD-EffLite0", "FID")  # names that stand for one file of weights


def write_table(rows: pd.DataFrame, out_dir: str | os.PathLike[str], caption: str) -> None:
    """Write table.csv (full precision), table.md below `caption`, and table.tex.

    In the latter two the lowest value among rows of one number of steps is bold. The other metrics
    are columns of table.csv, and a second table of table.md. table.csv also records what rows were
    measured with, because tables of several experiments may meet there.

    Raises:
        ValueError: rows that were measured with another detector or against another reference than
            the first.
    """
    check_comparable(rows)
    _write(Path(out_dir) / "table.csv", csv_frame(rows).to_csv(index=False, lineterminator="\n"))
    tables = [caption, markdown_table(rows), *filter(None, [metrics_table(rows)])]
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
    columns = [*COLUMNS[:-2], *other, *known, *COLUMNS[-2:]]
    return rows.reset_index()[columns].rename(columns=other)


def text_frame(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows as they are shown, in some of `COLUMNS`."""
    known = rows.reset_index()
    texts = {name: [cell(value, name) for value in known[name]] for name in columns}
    return pd.DataFrame(texts, index=rows.index)


def markdown_table(rows: pd.DataFrame) -> str:
    """Rows as a Markdown table, columns padded, so that it reads well as plain text too."""
    text, best = text_frame(rows, COLUMNS), best_per_step_count(rows)
    text.loc[best, "value"] = "**" + text.loc[best, "value"] + "**"
    return _markdown(text.rename(columns=lambda name: name.replace("_", " ")), COLUMNS)


def metrics_table(rows: pd.DataFrame) -> str:
    """The other metrics as a Markdown table, what is known of their spread behind the value."""
    names = other_metrics(rows)
    if not names:
        return ""
    text = pd.DataFrame({"row": rows.index, **{name: spreads(rows, name) for name in names}})
    return _markdown(text, ["row", *(["value"] * len(names))])


def spreads(rows: pd.DataFrame, metric: str) -> list[str]:
    """Values of a metric with what is known of their spread: `3,774 ± 9`."""
    found = rows.reindex(columns=[f"metrics.{metric}.value", f"metrics.{metric}.std"])
    return [measured(value, std) for value, std in found.itertuples(index=False)]


def _markdown(text: pd.DataFrame, kinds: Sequence[str]) -> str:
    sides = ["right" if kind in NUMBERS else "left" for kind in kinds]
    return text.to_markdown(index=False, disable_numparse=True, colalign=sides)


def latex_table(rows: pd.DataFrame) -> str:
    """Rows as a `tabular` of the package booktabs, to be read in by a paper."""
    columns = [name for name in COLUMNS if name not in ("student", "metric")]
    heads = {name: name.replace("_", " ") for name in columns}
    heads["value"] = rows["metric"].iloc[0]
    text = text_frame(rows, columns).replace(MISSING, "--").rename(columns=heads)
    style = text.style.hide(axis="index").format(escape="latex")
    style = style.format_index(axis="columns", escape="latex")
    best = pd.IndexSlice[best_per_step_count(rows), [heads["value"]]]
    style = style.map(lambda _: "textbf:--rwrap", subset=best)
    kinds = "".join("r" if name in NUMBERS else "l" for name in columns)
    needs = "% made by `fewstep results-table`; needs \\usepackage{booktabs}\n"
    return needs + style.to_latex(hrules=True, column_format=kinds)


def write_metrics(
    rows: pd.DataFrame, floor: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Write one nested JSON, {metric: {row: value, ..., floor: value}}, for `dvc exp show`.

    One column a row: how a row is sampled stands in params.yaml. Full precision. The metric
    carries what it is against, and with which weights where its name does not tell: scores of
    experiments with different references or detectors never share a column.

    Raises:
        ValueError: a row called "floor", NaN.
    """
    if "floor" in rows.index:
        raise ValueError("need a row name other than 'floor', got 'floor' (params.yaml: rows)")
    metrics: dict[str, dict[str, float]] = {}
    for row in records(rows):
        metrics.setdefault(_column(row), {})[row["row"]] = row["value"]
    next(iter(metrics.values()))["floor"] = floor["value"]
    write_json(path, metrics)


def _column(row: Row) -> str:
    """`FID-ref-1a2b3c4d`: against a published file, by its sha256.

    `FD-EffLite0-ref-1a2b3c4d-10000`: against 10,000 images of our own data, by the sha256 of all.
    `FD-DINOv2-net-1a2b3c4d-ref-...`: with weights of that sha256. No dots: to DVC they are levels.
    """
    net = "" if row["metric"] in PINNED else f"-net-{row['detector_sha256'][:8]}"
    if isinstance(file := row.get("reference_file.sha256"), str):
        return f"{row['metric']}{net}-ref-{file[:8]}"
    return f"{row['metric']}{net}-ref-{row['data_sha256'][:8]}-{row['reference_images']}"


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
        f"{_seeds(rows)}. Real against real, {real} the floor: {floor['value']:.2f}. Bold: best "
        "at its number of steps." + _spread_of(rows) + "".join(f" Note: {n}." for n in _notes(rows))
    )


def _notes(rows: pd.DataFrame) -> list[str]:
    """What makes values doubtful, a covariance that is not of full rank say; each note once."""
    return [] if "notes" not in rows else rows["notes"].explode().dropna().unique().tolist()


def _seeds(rows: pd.DataFrame) -> str:
    """`from 0 to 5,999, the same in every row (teacher-heun-35: to 1,999)`."""
    last = rows["first_seed"] + rows["images"] * rows["seed_ranges"] - 1
    fewer = [f"{name}: to {seed:,}" for name, seed in last[last < last.max()].items()]
    less = f" ({'; '.join(fewer)})" if fewer else ""
    return f"from {rows['first_seed'].iloc[0]:,} to {last.max():,}, the same in every row{less}"


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
    return f" std: standard deviation {'; where there is one range, '.join(known)}."
