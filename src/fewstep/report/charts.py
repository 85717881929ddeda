"""Charts of distances and losses: inline SVG for the page, losses.png for everything else."""

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from fewstep.report.frames import records
from fewstep.report.pictures import INK, MUTED, save_png, white_figure
from fewstep.report.text import how_sampled
from fewstep.report.worsening import OTHERS
from fewstep.training.signs import SIGNS

if TYPE_CHECKING:  # matplotlib takes a second to import: only the charts pay for it
    from matplotlib.axes import Axes

FAINT = "#d9d9d9"
PALETTE = ("#2f6db3", "#c8553d", "#3f8f5b", "#8a5fb0", "#b8860b", "#4a9aa5") * 9
WIDTH, HEIGHT = 5.0, 3.5  # inches of 72 units: as many as a phone has pixels
PANEL = (340, 240)  # pixels of a panel of losses.png
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--line)"}
NOT_DRAWN = frozenset({"lr", "nonfinite_gradients"})  # known from the params, and nearly always 0


def draw(name: str, paint: Callable[["Axes"], object]) -> str:
    """The SVG of one chart in the page's own fonts and colours, light or dark.

    Args:
        name: keeps the ids in this SVG apart from those of others.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        _plain(axes)
        paint(axes)
        _legend(axes)
        text = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _themed(text.getvalue())


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, which="both")
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: "Axes") -> None:
    """Below the chart, where it hides nothing."""
    if axes.get_legend_handles_labels()[1]:
        style = {"frameon": False, "labelcolor": INK, "fontsize": 9, "handlelength": 1.4}
        place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2), "ncols": 2}
        axes.legend(**style, **place)


def _themed(svg: str) -> str:
    """An inline element of the page: no prolog, no fixed size, colours and fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"font-family:[^;\"']*|font:\s*([\d.]+px)[^;\"]*", _own_font, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("#000000", "var(--ink)").replace("<svg ", '<svg role="img" ', 1)


def _own_font(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}" if match[1] else "font-family: inherit"


def distance_by_nfe(rows: pd.DataFrame, floor: float, others: pd.DataFrame | None = None) -> str:
    """Each model's distance over its network calls, the floor, and published values, hollow."""
    curves = [f"{row['student']} {how_sampled(row)}" for row in records(rows)]

    def paint(axes: "Axes") -> None:
        _errorbars(axes, rows, curves, "nfe")
        if others is not None and not others.empty:
            style = {"marker": "o", "facecolors": "none", "edgecolors": MUTED, "s": 24}
            axes.scatter(others["nfe"], others["fid"], label="published", **style)
        axes.axhline(floor, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label="real images")
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        axes.set_xlabel("network calls per image")
        axes.set_ylabel(rows["metric"].iloc[0])

    return draw("nfe", paint)


def distance_by_guidance(rows: pd.DataFrame) -> str | None:
    """Distance over the guidance scale, where rows differ in it alone; None where none do."""
    rows = rows[rows.duplicated(["student", "sampler", "steps"], keep=False)]
    if rows.empty:
        return None
    curves = [f"{r['student']} {r['sampler']}, {r['steps']} steps" for r in records(rows)]

    def paint(axes: "Axes") -> None:
        _errorbars(axes, rows, curves, "guidance_scale")
        _logarithmic(axes, "y")
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(rows["metric"].iloc[0])

    return draw("guidance", paint)


def _errorbars(axes: "Axes", rows: pd.DataFrame, curves: Sequence[str], over: str) -> None:
    """Values of rows over one of their columns, a curve for each name, with their spread."""
    groups = rows.assign(curve=curves).groupby("curve", sort=False)
    for (name, group), colour in zip(groups, PALETTE, strict=False):
        group = group.sort_values(over, kind="stable")
        style = {"color": colour, "linewidth": 1.4}
        axes.errorbar(group[over], group["value"], group["std"].fillna(0), capsize=2, **style)
        axes.plot(group[over], group["value"], marker="o", markersize=5, label=str(name), **style)


def validation_by_kimg(logs: pd.DataFrame, what: str, level: float | None = None) -> str | None:
    """A value of validations over training images, a line a training; None where there is none.

    Args:
        what: a sign of mode seeking, or else the distance, on a logarithmic axis.
        level: the value that real images would have, if it is known without them.
    """
    validation = logs[logs["name"] == f"validation/{what}"]
    if validation.empty:
        return None

    def paint(axes: "Axes") -> None:
        groups = validation.groupby("model", sort=False)
        for (model, curve), colour in zip(groups, PALETTE, strict=False):
            style = {"color": colour, "marker": "o", "markersize": 4}
            axes.plot(curve["kimg"], curve["value"], label=str(model), **style)
        levels = _levels(logs, f"validation/{what}")
        _draw_levels(axes, levels if level is None else {"real images": level, **levels})
        if what not in SIGNS:
            _logarithmic(axes, "y")
        axes.set_xlabel("training images, thousands")
        axes.set_ylabel(f"validation {what.replace('_', ' ')}")

    return draw(f"kimg-{what}", paint)


def _levels(logs: pd.DataFrame, name: str) -> dict[str, float]:
    """What the teacher and real images have of a value, as far as it is logged."""
    kinds = {"teacher": "teacher_", "real images": "real_"}
    found = {
        kind: logs.loc[logs["name"] == name.replace("/", f"/{start}"), "value"]
        for kind, start in kinds.items()
    }
    return {kind: values.iloc[0] for kind, values in found.items() if len(values)}


def _draw_levels(axes: "Axes", levels: Mapping[str, float]) -> None:
    for (kind, level), dashes in zip(levels.items(), ((4, 3), (1, 2)), strict=False):
        axes.axhline(level, color=MUTED, linestyle=(0, dashes), linewidth=1, label=kind)


# --- losses -------------------------------------------------------------------------------------


def losses(model: str, log: pd.DataFrame) -> str:
    """The curves of one training in one chart.

    Args:
        log: the lines of `frames.logs_frame` that are to be drawn.
    """

    def paint(axes: "Axes") -> None:
        _paint_curves(axes, log, PALETTE)
        axes.set_xlabel("training images, thousands")

    return draw(f"loss-{model}", paint)


def loss_curves(logs: pd.DataFrame, models: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write one PNG: a line of panels for every model, a panel for every loss and score it logs.

    Args:
        logs: of `frames.logs_frame`; names with a slash, which break a loss down, are not drawn.
    """
    import matplotlib

    scores, others = logs["name"].str.startswith("validation/"), logs["name"].str.match(OTHERS)
    drawn = (scores | ~logs["name"].str.contains("/")) & ~logs["name"].isin(NOT_DRAWN)
    logs, compared = logs[drawn & ~others], logs[others]
    across = max(2, *logs.groupby("model")["name"].nunique(), 2)
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = white_figure(across * PANEL[0], max(1, len(models)) * PANEL[1])
        axes = figure.subplots(max(1, len(models)), across, squeeze=False)
        for line, model in zip(axes, models or ["no students"], strict=True):
            _panels(line, logs[logs["model"] == model], compared[compared["model"] == model])
            title = {"fontsize": 10.5, "color": INK, "weight": "bold"}
            line[0].set_title(model, loc="left", **title)
        figure.tight_layout(pad=1.2, w_pad=1.6, h_pad=1.6)
        save_png(figure, path)


def _panels(line: Sequence["Axes"], log: pd.DataFrame, compared: pd.DataFrame) -> None:
    """A panel for each name and what it is compared with; what is left of the line stays empty."""
    curves = list(log.groupby("name", sort=False))
    for axes in line[max(1, len(curves)) :]:
        axes.axis("off")
    if not curves:
        line[0].axis("off")
        line[0].text(0.5, 0.5, "nothing logged", ha="center", color=MUTED)
    for axes, colour, (name, curve) in zip(line, PALETTE, curves, strict=False):
        _plain(axes)
        _paint_curves(axes, curve, [colour])
        if levels := _levels(compared, str(name)):
            _draw_levels(axes, levels)
            lines = [line for line in axes.lines if line.get_label() in levels]
            axes.legend(handles=lines, frameon=False, labelcolor=MUTED, fontsize=7)
        axes.set_xlabel("kimg")
        title = str(name).removeprefix("validation/").replace("_", " ")
        axes.set_title(title, loc="right", color=MUTED)


def _paint_curves(axes: "Axes", log: pd.DataFrame, colours: Sequence[str]) -> None:
    """Logged values faint, their running mean over a thirtieth of the training dark."""
    for (name, curve), colour in zip(log.groupby("name", sort=False), colours, strict=False):
        marker = "o" if len(curve) == 1 else None
        smooth = smoothed(curve["value"], max(1, len(curve) // 30))
        axes.plot(curve["kimg"], curve["value"], color=colour, alpha=0.25, linewidth=0.8)
        label = str(name).replace("_", " ")
        axes.plot(curve["kimg"], smooth, color=colour, linewidth=1.5, marker=marker, label=label)
    if 0 < log["value"].min() < log["value"].max() / 20:
        _logarithmic(axes, "y")


def smoothed(values: pd.Series, window: int) -> pd.Series:
    """Centred running mean over `window` values, over fewer at the ends; shape kept."""
    return values.rolling(window, min_periods=1, center=True).mean()


def _logarithmic(axes: "Axes", which: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade, or at 1 where decades are
    many; matplotlib's own labels overlap. An axis with values that are not positive stays as it is.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
    if low <= 0:
        return
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
