"""The results table in three forms, metrics.json, and rows as lines of text.

A row is a mapping with the keys in `COLUMNS`; None stands for what a row does not have
(a downloaded teacher has no kimg). Its order is that of params.yaml: rows.
"""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.files import atomic_path, write_json

Row = Mapping[str, Any]

COLUMNS: tuple[str, ...] = (
    "row",
    "student",
    "method",
    "sampler",
    "steps",
    "nfe",
    "guidance_scale",
    "metric",
    "value",
    "std",
    "images",
    "seed_ranges",
    "kimg",
    "train_seconds",
)
MEASURED_WITH = ("published", "published_source", "detector_sha256", "reference_sha256")
PINNED = ("FD-EffLite0", "FID")  # names that stand for one file of weights
NUMBERS = frozenset(COLUMNS) - {"row", "student", "method", "sampler", "metric"}


def write_table(rows: Sequence[Row], out_dir: str | os.PathLike[str], caption: str) -> None:
    """Write table.csv (full precision), table.md below `caption`, and table.tex.

    In the latter two the lowest value among rows of one number of steps is bold. The other metrics
    are columns of table.csv, and a second table of table.md. What rows were measured with stands
    in table.csv, where tables of several experiments may meet.

    Raises:
        ValueError: no rows, a row without one of `COLUMNS`, or rows that were measured with
            another detector or against another reference than the first.
    """
    _check_rows(rows)
    out_dir, extra = Path(out_dir), other_metrics(rows)
    known = [name for name in MEASURED_WITH if name in rows[0]]
    columns = [*COLUMNS[:-2], *extra, *known, *COLUMNS[-2:]]
    with atomic_path(out_dir / "table.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **{name: value_of(row, name) for name in extra}} for row in rows)
    tables = [caption, markdown_table(rows), *filter(None, [metrics_table(rows)])]
    with atomic_path(out_dir / "table.md") as path:
        path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    with atomic_path(out_dir / "table.tex") as path:
        path.write_text(latex_table(rows), encoding="utf-8")


def other_metrics(rows: Sequence[Row]) -> list[str]:
    """Names of the metrics beside the first, in order, of whatever rows have them."""
    names = (name for row in rows for name in row.get("metrics", {}) if name != row["metric"])
    return list(dict.fromkeys(names))


def value_of(row: Row, metric: str) -> float | None:
    """The value of one of the other metrics."""
    return row.get("metrics", {}).get(metric, {}).get("value")


def metrics_table(rows: Sequence[Row]) -> str:
    """The other metrics as a Markdown table, what is known of their spread behind the value."""
    names = other_metrics(rows)
    if not names:
        return ""
    cells = [[row["row"], *(_with_spread(row, name) for name in names)] for row in rows]
    return _markdown(["row", *names], cells, [False, *(True for _ in names)])


def _with_spread(row: Row, metric: str) -> str:
    found = row.get("metrics", {}).get(metric)
    if found is None:
        return "–"
    return measured(found["value"], found["std"])


def measured(value: float, std: float | None) -> str:
    """`11.89 ± 0.70`: two digits of the spread, as many decimals of the value."""
    if not std:
        return significant(value)
    decimals = min(max(1 - math.floor(math.log10(std)), 0), 6)
    return f"{value:,.{decimals}f} ± {std:,.{decimals}f}"


def significant(value: float) -> str:
    """Three digits, without an exponent: `0.00412`, `0.731`, `12.3`, `1,234`."""
    return (
        f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:#.3g}"
        if abs(value) >= 1e-4
        else (f"{value:.1e}" if value else "0")
    )


def latex_table(rows: Sequence[Row]) -> str:
    """Rows as a `tabular` of the package booktabs, to be read in by a paper."""
    columns = [name for name in COLUMNS if name not in ("student", "metric")]
    best = best_per_step_count(rows)
    kinds = "".join("r" if name in NUMBERS else "l" for name in columns)
    heads = [rows[0]["metric"] if name == "value" else name.replace("_", " ") for name in columns]
    lines = ["% made by `fewstep results-table`; needs \\usepackage{booktabs}"]
    lines += [f"\\begin{{tabular}}{{{kinds}}}", "\\toprule", _latex(heads), "\\midrule"]
    for row in rows:
        cells = [_latex_text(cell(row, name, bold=False)) for name in columns]
        if row["row"] in best:
            place = columns.index("value")
            cells[place] = f"\\textbf{{{cells[place]}}}"
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex_text, cells)) + " \\\\"


def _latex_text(text: str) -> str:
    """Plain text with what LaTeX would take for commands escaped."""
    special = {char: f"\\{char}" for char in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "–": "--"}
    special["^"] = r"\textasciicircum{}"
    return "".join(special.get(char, char) for char in text)


def table_caption(
    rows: Sequence[Row],
    reference_images: int,
    floor: Mapping[str, Any],
    notes: Sequence[str] = (),
    reference_file: Mapping[str, str] | None = None,
) -> str:
    """The lines that say how to read the table.

    Args:
        reference_images: real images behind the reference; of a published one, those that all
            metrics but the first are against.
        floor: `value` of `images` real images against `other_images` disjoint ones, or against
            the published reference.
        notes: what makes values doubtful, a covariance that is not of full rank say.
        reference_file: `url` and `sha256` of a published reference.
    """
    if reference_file is None:
        against = f"{reference_images:,} real images"
        real = f"{floor['images']:,} images against {floor['other_images']:,} others, is"
    else:
        name = reference_file["url"].rpartition("/")[2]
        against = (
            f"the published statistics {name} (sha256 {reference_file['sha256'][:12]}), all other "
            f"metrics against {reference_images:,} images of our own data"
        )
        real = (
            f"{floor['images']:,} images of our own data against these statistics, which may be "
            "of the same images, is"
        )
    return (
        f"{rows[0]['metric']} (lower is better) against {against}; one image for each seed "
        f"{_seeds(rows)}. Real against real, {real} the floor: {floor['value']:.2f}. Bold: best "
        "at its number of steps." + _spreads(rows) + "".join(f" Note: {note}." for note in notes)
    )


def _seeds(rows: Sequence[Row]) -> str:
    """`from 0 to 5,999, the same in every row (teacher-heun-35: to 1,999)`."""
    last = {r["row"]: r["first_seed"] + r["images"] * r["seed_ranges"] - 1 for r in rows}
    most = max(last.values())
    fewer = [f"{name}: to {seed:,}" for name, seed in last.items() if seed < most]
    less = f" ({'; '.join(fewer)})" if fewer else ""
    return f"from {rows[0]['first_seed']:,} to {most:,}, the same in every row{less}"


def _spreads(rows: Sequence[Row]) -> str:
    """What `std` is of: the seed ranges, the bootstrap, or either."""
    kinds = {row["metrics"][row["metric"]]["std_of"] for row in rows}
    of = {
        "ranges": "over the disjoint seed ranges, of one range's value",
        "resamples": "over resamples of a row's images (bootstrap)",
    }
    known = [text for kind, text in of.items() if kind in kinds]
    if not known:
        return ""
    return f" std: standard deviation {'; where there is one range, '.join(known)}."


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, columns padded, so that it reads well as plain text too."""
    best = best_per_step_count(rows)
    cells = [[cell(row, column, bold=row["row"] in best) for column in COLUMNS] for row in rows]
    header = [column.replace("_", " ") for column in COLUMNS]
    return _markdown(header, cells, [column in NUMBERS for column in COLUMNS])


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A Markdown table, columns padded, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(texts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(header), line(rule), *map(line, cells)])


def write_metrics(
    rows: Sequence[Row], floor: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Write one nested JSON, {metric: {row: value, ..., floor: value}}, for `dvc exp show`.

    One column a row: how a row is sampled stands in params.yaml. Full precision. The metric
    carries what it is against, and with which weights where its name does not tell: scores of
    experiments with different references or detectors never share a column.

    Raises:
        ValueError: no rows, a row without one of `COLUMNS`, a row called "floor", NaN.
    """
    _check_rows(rows)
    if any(row["row"] == "floor" for row in rows):
        raise ValueError("need a row name other than 'floor', got 'floor' (params.yaml: rows)")
    metrics: dict[str, dict[str, float]] = {}
    for row in rows:
        metrics.setdefault(_column(row), {})[row["row"]] = row["value"]
    metrics[_column(rows[0])]["floor"] = floor["value"]
    write_json(path, metrics)


def _column(row: Row) -> str:
    """`FID-ref-1a2b3c4d`: against a published file, by its sha256.

    `FD-EffLite0-ref-1a2b3c4d-10000`: against 10,000 images of our own data, by the sha256 of all.
    `FD-DINOv2-net-1a2b3c4d-ref-...`: with weights of that sha256. No dots: to DVC they are levels.
    """
    net = "" if row["metric"] in PINNED else f"-net-{row['detector_sha256'][:8]}"
    if (file := row["reference_file"]) is not None:
        return f"{row['metric']}{net}-ref-{file['sha256'][:8]}"
    return f"{row['metric']}{net}-ref-{row['data_sha256'][:8]}-{row['reference_images']}"


def format_row(row: Row) -> str:
    """A finished row as one line; the lines of several rows align."""
    steps = f"{row['steps']} step" + ("s" if row["steps"] != 1 else "")
    parts = [
        f"{row['row']:<20}",
        f"{row['metric']} {row['value']:8.2f}",
        f"{row['sampler']:<7}",
        f"{steps:>9}",
        f"{row['nfe']:>4} NFE",
        f"guidance {row['guidance_scale']:g}",
        f"{row['images']:,} images",
    ]
    return "  ".join(parts)


def row_caption(row: Row) -> str:
    """What stands under the row's name in the sample grid: sampler, NFE, value."""
    guidance = f", guidance {row['guidance_scale']:g}" if row["guidance_scale"] != 1 else ""
    return f"{row['sampler']}{guidance} · {row['nfe']} NFE · {row['metric']} {row['value']:.1f}"


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("need at least 1 row, got 0 (params.yaml: rows)")
    for row in rows:
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"need every column in row {row.get('row', '?')}, got none for {', '.join(missing)}"
            )
    for key in ("metric", "detector_sha256", "reference_sha256"):
        other = next((row for row in rows if row.get(key) != rows[0].get(key)), None)
        if other is not None:
            raise ValueError(
                f"need one {key} in a table, got {rows[0].get(key)} of {rows[0]['row']} and "
                f"{other.get(key)} of {other['row']}; score the rows again (fewstep fid)"
            )


def best_per_step_count(rows: Sequence[Row]) -> set[str]:
    """Names of the rows that beat another one with the same number of steps."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["steps"], []).append(row)
    return {
        min(group, key=lambda row: row["value"])["row"]
        for group in groups.values()
        if len(group) > 1
    }


def cell(row: Row, column: str, bold: bool) -> str:
    value = row[column]
    if value is None or value == "":
        return "–"
    if column == "value":
        return f"**{value:.2f}**" if bold else f"{value:.2f}"
    if column == "std":
        return measured(value, value).partition(" ± ")[0]
    if column == "train_seconds":
        return f"{value:,.0f}"
    if column in NUMBERS:
        return f"{value:,.10g}"
    return str(value)
