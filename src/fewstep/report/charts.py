"""Charts of the page: SVG by matplotlib, in the page's own fonts and colours, light or dark."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.report.figures import FAINT, INK, MUTED, PALETTE, smoothed
from fewstep.report.published import Published

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Row = Mapping[str, Any]
WIDTH, HEIGHT = 5.0, 3.5  # inches of 72 units: as many as a phone has pixels
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--line)"}


def draw(name: str, paint: Callable[["Axes"], object], height: float = HEIGHT) -> str:
    """The SVG of one chart; `name` keeps the ids in it apart from those of others."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
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


def distance_by_nfe(rows: Sequence[Row], floor: float, others: Sequence[Published] = ()) -> str:
    """Each model's distance over its network calls, the floor, and published values, hollow."""

    def paint(axes: "Axes") -> None:
        for (name, group), colour in zip(_curves(rows).items(), PALETTE * 9, strict=False):
            _errorbars(axes, group, "nfe", name, colour)
        if others:
            nfe, values = [p.nfe for p in others], [p.fid for p in others]
            style = {"marker": "o", "facecolors": "none", "edgecolors": MUTED, "s": 24}
            axes.scatter(nfe, values, label="published", **style)
        axes.axhline(floor, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label="real images")
        _logarithmic(axes, x=True)
        axes.set_xlabel("network calls per image")
        axes.set_ylabel(rows[0]["metric"])
        _legend(axes)

    return draw("nfe", paint)


def _errorbars(axes: "Axes", rows: Sequence[Row], over: str, name: str, colour: str) -> None:
    """Values of rows over one of their columns, with what is known of their spread."""
    x, y, errors = zip(*((r[over], r["value"], r["std"] or 0) for r in rows), strict=True)
    style = {"color": colour, "linewidth": 1.4}
    axes.errorbar(x, y, yerr=errors, capsize=2, **style)
    axes.plot(x, y, marker="o", markersize=5, label=name, **style)


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in their steps alone, in the order of their network calls."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        guidance = f", guidance {row['guidance_scale']:g}" if row["guidance_scale"] != 1 else ""
        found.setdefault(f"{row['student']} {row['sampler']}{guidance}", []).append(row)
    return {name: sorted(group, key=lambda r: r["nfe"]) for name, group in found.items()}


def distance_by_guidance(rows: Sequence[Row]) -> str | None:
    """Distance over the guidance scale, where rows differ in it alone; None where none do."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{row['student']} {row['sampler']}, {row['steps']} steps"
        groups.setdefault(name, []).append(row)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    if not groups:
        return None

    def paint(axes: "Axes") -> None:
        for (name, group), colour in zip(groups.items(), PALETTE * 9, strict=False):
            group = sorted(group, key=lambda r: r["guidance_scale"])
            _errorbars(axes, group, "guidance_scale", name, colour)
        _logarithmic(axes)
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(rows[0]["metric"])
        _legend(axes)

    return draw("guidance", paint)


def distance_by_kimg(curves: Mapping[str, Curve], metric: str) -> str | None:
    """Validation distance over training images, a line a training; None without validation."""
    if not curves:
        return None

    def paint(axes: "Axes") -> None:
        for (name, (kimg, values)), colour in zip(curves.items(), PALETTE * 9, strict=False):
            axes.plot(kimg, values, color=colour, marker="o", markersize=4, label=name)
        _logarithmic(axes)
        axes.set_xlabel("training images, thousands")
        axes.set_ylabel(f"validation {metric}")
        _legend(axes)

    return draw("kimg", paint)


def losses(student: str, curves: Mapping[str, Curve]) -> str:
    """The losses of one training: logged values faint, their running mean dark."""

    def paint(axes: "Axes") -> None:
        for (name, (kimg, values)), colour in zip(curves.items(), PALETTE * 9, strict=False):
            axes.plot(kimg, values, color=colour, alpha=0.25, linewidth=0.8)
            smooth = smoothed(values, max(1, len(values) // 30))
            axes.plot(kimg, smooth, color=colour, linewidth=1.5, label=name.replace("_", " "))
        if all(values.min() > 0 for _, values in curves.values()):
            _logarithmic(axes)
        axes.set_xlabel("training images, thousands")
        _legend(axes)

    return draw(f"loss-{student}", paint)


def _logarithmic(axes: "Axes", x: bool = False) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5; where all is of one size, linear."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    both = [("x", axes.xaxis, x), ("y", axes.yaxis, axes.dataLim.y0 > 0)]
    for name, axis, wanted in both:
        if not wanted:
            continue
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        low, high = axes.dataLim.intervalx if name == "x" else axes.dataLim.intervaly
        subs = (1.0,) if high > 1000 * max(low, 1e-9) else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())


def _legend(axes: "Axes") -> None:
    """Below the chart, where it hides nothing."""
    count = len(axes.get_legend_handles_labels()[1])
    if count:
        style = {"frameon": False, "labelcolor": INK, "fontsize": 9, "handlelength": 1.4}
        place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2), "ncols": 2}
        axes.legend(**style, **place)
