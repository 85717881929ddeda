"""Rows and their numbers as text, for tables, the page, sample grids and the terminal.

It stays free of pandas, as stages that print a single row import it.
"""

import math
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

COLUMNS: tuple[str, ...] = (
    *("row", "student", "method", "sampler", "steps", "nfe", "guidance_scale"),
    *("metric", "value", "std", "images", "seed_ranges", "kimg"),
)
"""What every scored row has; training times, which differ between runs, are on the page alone."""
NUMBERS = {"train_seconds", *COLUMNS} - {"row", "student", "method", "sampler", "metric"}
MISSING = "–"
SCORE_DIGITS, CURVE_DIGITS = 3, 4
"""Significant digits in the files of results/ that are in git. Threads and processors change a
score in the fourth digit and its seeds in the second; artifacts/scores has all digits."""


def cell(value: Any, column: str) -> str:  # noqa: ANN401
    """What a table shows of a value in one of `COLUMNS`."""
    if is_missing(value) or value == "":
        return MISSING
    if column == "value":
        return significant(value)
    if column == "std":
        return measured(value, value).partition(" ± ")[0]
    if column == "train_seconds":
        return f"{value:,.0f}"
    return f"{value:,.10g}" if column in NUMBERS else str(value)


def rounded(value: float, digits: int = SCORE_DIGITS) -> float:
    """The nearest number of so many significant digits, whole above them; NaN stays."""
    if not value or not math.isfinite(value):
        return value
    return round(value, max(digits - 1 - math.floor(math.log10(abs(value))), 0))


def is_missing(value: object) -> bool:
    """None as JSON has it, NaN as pandas does."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def measured(value: float | None, std: float | None) -> str:
    """`11.89 ± 0.70`: two digits of the spread, as many decimals of the value."""
    if value is None or is_missing(value):
        return MISSING
    if not std or is_missing(std):
        return significant(value)
    decimals = min(max(1 - math.floor(math.log10(std)), 0), 6)
    return f"{value:,.{decimals}f} ± {std:,.{decimals}f}"


def significant(value: float) -> str:
    """Three digits, without an exponent: `0.00412`, `0.731`, `12.3`, `1,234`."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:#.3g}"
    return f"{value:.1e}" if value else "0"


def format_row(row: Row) -> str:
    """A finished row as one line; the lines of several rows align."""
    steps = f"{row['steps']} step" + ("s" if row["steps"] != 1 else "")
    return (
        f"{row['row']:<20}  {row['metric']} {row['value']:8.2f}  {row['sampler']:<7}  {steps:>9}  "
        f"{row['nfe']:>4} NFE  guidance {row['guidance_scale']:g}  {row['images']:,} images"
    )


def row_caption(row: Row) -> str:
    """What stands under the row's name in the sample grid: value, NFE, sampler.

    Where it does not fit, it is cut at its end.
    """
    return f"{row['metric']} {row['value']:.1f} · {row['nfe']} NFE · {how_sampled(row)}"


def how_sampled(row: Row) -> str:
    """The sampler, and the guidance where it is on."""
    scale = row["guidance_scale"]
    return row["sampler"] + (f", guidance {scale:g}" if scale != 1 else "")
