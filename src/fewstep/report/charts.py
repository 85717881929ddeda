"""Charts of distances and losses: inline SVG for the page, losses.png for everything else.

A model has one colour in all of them, and its name stands at its curve.
"""

import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fewstep.paths import trained
from fewstep.report.frames import records
from fewstep.report.pictures import INK, MUTED, save_png, white_figure
from fewstep.report.text import Row, how_sampled
from fewstep.report.worsening import OTHERS
from fewstep.training.signs import SIGNS

if TYPE_CHECKING:  # matplotlib takes a second to import: only the charts pay for it
    from matplotlib.axes import Axes

FAINT = "#d9d9d9"
PALETTE = ("#2f6db3", "#b8452e", "#2e7d4a", "#8a5fb0", "#8f6708", "#257680")
"""Of models, as readable as text on white; the page has others for the dark, `--model-0` and on."""
DASHES = ("-", "--", ":", "-.")  # of the losses of one model
LINE = 11  # points from one label to the next
WIDTH, HEIGHT = 5.0, 3.5  # inches of 72 units: as many as a phone has pixels
PANEL = (340, 240)  # pixels of a panel of losses.png
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--line)"} | {
    colour: f"var(--model-{number})" for number, colour in enumerate(PALETTE)
}
NOT_DRAWN = frozenset({"lr", "nonfinite_gradients"})  # known from the params, and nearly always 0


def colours_of(models: Iterable[str]) -> dict[str, str]:
    """A colour for each model, the teacher's that of text; `cd@best` has that of `cd`."""
    found, free = {"teacher": INK}, itertools.cycle(PALETTE)
    for model in models:
        training = trained(model)
        found[training] = found.get(training) or next(free)
        found[model] = found[training]
    return found


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


class Label(NamedTuple):
    """A text at a point of the data."""

    x: float
    y: float
    text: str
    colour: str


def _place(axes: "Axes", labels: Sequence[Label]) -> None:
    """Write each label right of its point, higher or lower where another one stands already."""
    axes.autoscale_view()
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    points = (points * 72 / axes.figure.dpi).tolist()
    taken = [(x - 4, y, 8.0) for x, y in points]  # by the markers
    for label, (x, y) in zip(labels, points, strict=True):
        x, width = x + 5, 6.0 * len(label.text)
        moves = (sign * LINE * step / 2 for step in range(40) for sign in (1, -1))
        free = (m for m in moves if not any(_meet(x, y + m, width, other) for other in taken))
        move = next(free, 0.0)
        taken.append((x, y + move, width))
        axes.annotate(
            label.text,
            (label.x, label.y),
            (7, move),
            textcoords="offset points",
            color=label.colour,
            fontsize=9,
            va="center",
        )


def _meet(x: float, y: float, width: float, other: tuple[float, float, float]) -> bool:
    left, height, wide = other
    return x < left + wide and left < x + width and abs(y - height) < LINE


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


def distance_by_nfe(
    rows: pd.DataFrame,
    floor: float,
    others: pd.DataFrame | None = None,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Each model's distance over its network calls, the floor, and published values, hollow."""
    samplers = rows.groupby("student")["sampler"].nunique().to_dict()
    curves = [_curve(row, samplers[row["student"]] > 1) for row in records(rows)]

    def paint(axes: "Axes") -> None:
        labels = _errorbars(axes, rows, curves, "nfe", colours or colours_of(rows["student"]))
        if others is not None and not others.empty:
            style = {"marker": "o", "facecolors": "none", "edgecolors": MUTED, "s": 24}
            axes.scatter(others["nfe"], others["fid"], **style)
            last = others.sort_values("nfe").iloc[-1]
            labels.append(Label(last["nfe"], last["fid"], "published, hollow", MUTED))
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        labels += _draw_levels(axes, {"real images": floor})
        axes.set_xlabel("network calls per image (NFE)")
        axes.set_ylabel(rows["metric"].iloc[0])
        _place(axes, labels)

    return draw("nfe", paint)


def _curve(row: Row, several_samplers: bool) -> str:
    """What is joined by a line, as its label: `teacher euler`, `cd-8`, `cd-8, guidance 1.5`."""
    sampled = how_sampled(row)
    if several_samplers:
        return f"{row['student']} {sampled}"
    return row["student"] + sampled.removeprefix(row["sampler"])


def distance_by_guidance(
    rows: pd.DataFrame, colours: Mapping[str, str] | None = None
) -> str | None:
    """Distance over the guidance scale, where rows differ in it alone; None where none do."""
    rows = rows[rows.duplicated(["student", "sampler", "steps"], keep=False)]
    if rows.empty:
        return None
    curves = [f"{r['student']} {r['sampler']}, {r['steps']} steps" for r in records(rows)]

    def paint(axes: "Axes") -> None:
        known = colours or colours_of(rows["student"])
        labels = _errorbars(axes, rows, curves, "guidance_scale", known)
        _logarithmic(axes, "y")
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(rows["metric"].iloc[0])
        _place(axes, labels)

    return draw("guidance", paint)


def _errorbars(
    axes: "Axes",
    rows: pd.DataFrame,
    curves: Sequence[str],
    over: str,
    colours: Mapping[str, str],
) -> list[Label]:
    """Values of rows over one of their columns, a curve for each name, with their spread."""
    labels = []
    for name, group in rows.assign(curve=curves).groupby("curve", sort=False):
        group = group.sort_values(over, kind="stable")
        colour = colours[str(group["student"].iloc[0])]
        style = {"color": colour, "linewidth": 1.4}
        axes.errorbar(group[over], group["value"], group["std"].fillna(0), capsize=2, **style)
        fill = "none" if (group["guidance_scale"] != 1).all() else colour
        axes.plot(group[over], group["value"], "o-", markersize=5, markerfacecolor=fill, **style)
        labels.append(Label(group[over].iloc[-1], group["value"].iloc[-1], str(name), colour))
    return labels


def validation_by_kimg(
    logs: pd.DataFrame,
    what: str,
    level: float | None = None,
    colours: Mapping[str, str] | None = None,
) -> str | None:
    """A value of validations over training images, a line a training; None where there is none.

    Args:
        what: a sign of mode seeking, or else the distance, on a logarithmic axis.
        level: the value that real images would have, if it is known without them.
    """
    validation = logs[logs["name"] == f"validation/{what}"]
    if validation.empty:
        return None

    def paint(axes: "Axes") -> None:
        labels, known = [], colours or colours_of(logs["model"].unique())
        for model, curve in validation.groupby("model", sort=False):
            style = {"color": known[str(model)], "marker": "o", "markersize": 4}
            axes.plot(curve["kimg"], curve["value"], **style)
            last = curve.iloc[-1]
            labels.append(Label(last["kimg"], last["value"], str(model), known[str(model)]))
        if what not in SIGNS:
            _logarithmic(axes, "y")
        levels = _levels(logs, f"validation/{what}")
        labels += _draw_levels(axes, levels if level is None else {"real images": level, **levels})
        axes.set_xlabel("training images, thousands (kimg)")
        axes.set_ylabel(f"validation {what.replace('_', ' ')}")
        _place(axes, labels)

    return draw(f"kimg-{what}", paint)


def _levels(logs: pd.DataFrame, name: str) -> dict[str, float]:
    """What the teacher and real images have of a value, as far as it is logged."""
    kinds = {"teacher": "teacher_", "real images": "real_"}
    found = {
        kind: logs.loc[logs["name"] == name.replace("/", f"/{start}"), "value"]
        for kind, start in kinds.items()
    }
    return {kind: values.iloc[0] for kind, values in found.items() if len(values)}


def _draw_levels(axes: "Axes", levels: Mapping[str, float]) -> list[Label]:
    """Lines across the chart; their labels stand at its right end."""
    for (kind, level), dashes in zip(levels.items(), ((4, 3), (1, 2)), strict=False):
        axes.axhline(level, color=MUTED, linestyle=(0, dashes), linewidth=1, label=kind)
    end = axes.get_xlim()[1]
    return [Label(end, level, kind, MUTED) for kind, level in levels.items()]


# --- losses -------------------------------------------------------------------------------------


def losses(model: str, log: pd.DataFrame, colour: str = PALETTE[0]) -> str:
    """The curves of one training in one chart, told apart by their dashes.

    Args:
        log: the lines of `frames.logs_frame` that are to be drawn.
        colour: the model's.
    """

    def paint(axes: "Axes") -> None:
        labels = _paint_curves(axes, log, colour)
        axes.set_xlabel("training images, thousands (kimg)")
        axes.set_ylabel("loss")
        _place(axes, labels)

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
    colours = colours_of(models)
    across = max(2, *logs.groupby("model")["name"].nunique(), 2)
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = white_figure(across * PANEL[0], max(1, len(models)) * PANEL[1])
        axes = figure.subplots(max(1, len(models)), across, squeeze=False)
        for line, model in zip(axes, models or ["no students"], strict=True):
            colour = colours.get(model, INK)
            own, other = logs[logs["model"] == model], compared[compared["model"] == model]
            _panels(line, own, other, colour)
            title = {"fontsize": 10.5, "color": colour, "weight": "bold"}
            line[0].set_title(model, loc="left", **title)
        figure.tight_layout(pad=1.2, w_pad=1.6, h_pad=1.6)
        save_png(figure, path)


def _panels(line: Sequence["Axes"], log: pd.DataFrame, compared: pd.DataFrame, colour: str) -> None:
    """A panel for each name and what it is compared with; what is left of the line stays empty."""
    by_name = log.groupby("name", sort=False)  # scores, which all models share, come first
    curves = sorted(by_name, key=lambda named: not str(named[0]).startswith("validation/"))
    for axes in line[max(1, len(curves)) :]:
        axes.axis("off")
    if not curves:
        line[0].axis("off")
        line[0].text(0.5, 0.5, "nothing logged", ha="center", color=MUTED)
    for axes, (name, curve) in zip(line, curves, strict=False):
        _plain(axes)
        _paint_curves(axes, curve, colour)
        if levels := _levels(compared, str(name)):
            _draw_levels(axes, levels)
            lines = [line for line in axes.lines if line.get_label() in levels]
            axes.legend(handles=lines, frameon=False, labelcolor=MUTED, fontsize=7)
        axes.set_xlabel("kimg")
        title = str(name).removeprefix("validation/").replace("_", " ")
        axes.set_title(title, loc="right", color=MUTED)


def _paint_curves(axes: "Axes", log: pd.DataFrame, colour: str) -> list[Label]:
    """Logged values faint, their running mean over a thirtieth of the training dark."""
    labels, dashes = [], itertools.cycle(DASHES)
    for name, curve in log.groupby("name", sort=False):
        marker = "o" if len(curve) == 1 else None
        smooth = smoothed(curve["value"], max(1, len(curve) // 30))
        style: dict[str, Any] = {"color": colour, "linestyle": next(dashes)}
        axes.plot(curve["kimg"], curve["value"], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(curve["kimg"], smooth, linewidth=1.5, marker=marker, **style)
        text = str(name).replace("_", " ")
        labels.append(Label(curve["kimg"].iloc[-1], smooth.iloc[-1], text, colour))
    if 0 < log["value"].min() < log["value"].max() / 20:
        _logarithmic(axes, "y")
    return labels


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
