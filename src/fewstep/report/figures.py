"""Pictures: grids of samples, and the curves of trainings."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.files import atomic_path
from fewstep.tracking import TIMED, Log

if TYPE_CHECKING:  # matplotlib takes a second to import: only the figures pay for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1a1a1a", "#6b6b6b", "#d9d9d9"
PALETTE = ("#2f6db3", "#c8553d", "#3f8f5b", "#8a5fb0", "#b8860b", "#4a9aa5")


def sample_grid(
    samples: Mapping[str, NDArray[np.uint8]],
    captions: Mapping[str, str],
    path: str | os.PathLike[str],
    *,
    columns: int,
    lines: int = 5,
    panels_across: int = 3,
    title: str = "",
) -> None:
    """Write one PNG: a panel of sample images for every entry, in the order given.

    Image i of every entry stands at line i // columns, column i % columns of its panel; so with
    samples of one list of seeds, one place is one seed and class. Pixels are upscaled by a whole
    number without interpolation; the names are bold, the captions grey below them.

    Args:
        samples: uint8 (N, C, H, W), C = 1 or 3, N >= columns * lines, one shape for all;
            further images are not shown.
        captions: the grey line by entry; an entry may be absent.
        columns, lines: images in a panel.
        panels_across: panels beside one another.
        title: a line above everything.

    Raises:
        ValueError: no samples, too few of them, or shapes that differ.
    """
    shown = columns * lines
    if not samples:
        raise ValueError("need samples of at least 1 row, got 0 (params.yaml: rows)")
    for name, images in samples.items():
        if len(images) < shown:
            raise ValueError(
                f"need {shown} images of {name}, got {len(images)} (params.yaml: generate.images)"
            )
    if len({images.shape[1:] for images in samples.values()}) > 1:
        shapes = ", ".join(f"{images.shape[1:]} of {name}" for name, images in samples.items())
        raise ValueError(f"need images of one shape, got {shapes}")

    resolution = next(iter(samples.values())).shape[-1]
    scale = max(1, round(48 / resolution))
    panels = [tile(images[:shown], columns, scale) for images in samples.values()]
    height, width = panels[0].shape[:2]
    across = min(panels_across, len(panels))
    margin, gutter, head, label = 28, 28, 44 if title else 8, 46
    down = math.ceil(len(panels) / across)
    canvas_width = 2 * margin + across * width + (across - 1) * gutter
    canvas_height = head + down * (label + height + gutter // 2) + margin - gutter // 2

    canvas = np.full((canvas_height, canvas_width, 3), 255, dtype=np.uint8)
    figure = _figure(canvas_width, canvas_height)
    if title:
        room = canvas_width - 2 * margin
        _fitted_text(figure, margin, 34, title, room, {"fontsize": 13, "color": INK})
    for index, (name, panel) in enumerate(zip(samples, panels, strict=True)):
        left = margin + (index % across) * (width + gutter)
        top = head + (index // across) * (label + height + gutter // 2) + label
        canvas[top : top + height, left : left + width] = panel
        bold = {"fontsize": 11.5, "color": INK, "weight": "bold"}
        grey = {"fontsize": 9.5, "color": MUTED}
        _fitted_text(figure, left, top - 27, name, width, bold)
        _fitted_text(figure, left, top - 9, captions.get(name, ""), width, grey)
    figure.figimage(canvas, 0, 0)
    _save(figure, path)


def loss_curves(logs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write one PNG: a line of panels for every student, a panel for every loss and score it logs.

    The logged values are faint, their running mean over a thirtieth of the run is dark.

    Args:
        logs: log.jsonl by student. Names with a slash, which break a loss down, are not drawn.

    Raises:
        ValueError: a line that is no row of a log.
    """
    losses = {student: _main_curves(read_log(log)) for student, log in logs.items()}
    losses = losses or {"no students": {}}
    across = max(1, *(len(curves) for curves in losses.values()))
    panel_width, panel_height = 340, 240
    figure = _figure(max(across, 2) * panel_width, len(losses) * panel_height)
    axes = figure.subplots(len(losses), max(across, 2), squeeze=False)
    for line, (student, curves) in enumerate(losses.items()):
        for axis in axes[line][len(curves) :]:
            axis.axis("off")
        for axis, color, (loss, (kimg, values)) in zip(
            axes[line], PALETTE * 9, curves.items(), strict=False
        ):
            _curve(axis, kimg, values, color)
            axis.set_title(
                loss.removeprefix("validation/").replace("_", " "),
                loc="right",
                fontsize=9,
                color=MUTED,
            )
        axes[line][0].set_title(student, loc="left", fontsize=10.5, color=INK, weight="bold")
    figure.tight_layout(pad=1.2, w_pad=1.6, h_pad=1.6)
    _save(figure, path)


CLOCK = frozenset({"nimg", "kimg", "lr", "nonfinite_gradients", *TIMED})


def read_log(
    path: str | os.PathLike[str],
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The curves in a log.jsonl: {name: (kimg, value)}, both of shape (T,), where it has numbers.

    Raises:
        ValueError: a line that is no row of a log.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in Log(Path(path)).rows():
        for name, value in row.items():
            if name not in CLOCK and isinstance(value, int | float):
                points.setdefault(name, []).append((row["nimg"] / 1000, value))
    curves = {name: np.array(found, np.float64).T for name, found in points.items()}
    return {name: (kimg, values) for name, (kimg, values) in curves.items()}


def smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred running mean over `window` values, over fewer at the ends; shape kept."""
    kernel = np.ones(min(window, len(values)) or 1)
    total = np.convolve(values, kernel, mode="same")
    return total / np.convolve(np.ones(len(values)), kernel, mode="same")


def _main_curves(curves: Mapping[str, Any]) -> dict[str, Any]:
    main = (name for name in curves if "/" not in name or name.startswith("validation/"))
    return {name: curves[name] for name in main}


def _curve(
    axis: "Axes", kimg: NDArray[np.float64], values: NDArray[np.float64], color: str
) -> None:
    axis.set_xlabel("kimg", fontsize=8, color=MUTED)
    axis.tick_params(labelsize=8, colors=MUTED, length=3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.grid(axis="y", color=FAINT, linewidth=0.5)
    if len(values) == 0:
        axis.text(0.5, 0.5, "nothing logged", transform=axis.transAxes, ha="center", color=MUTED)
        return
    smooth = smoothed(values, window=max(1, len(values) // 30))
    axis.plot(kimg, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(kimg, smooth, color=color, linewidth=1.6, marker="o" if len(kimg) == 1 else None)
    if values.min() > 0 and smooth.max() > 20 * smooth.min():
        _log_scale(axis)


def _log_scale(axis: "Axes") -> None:
    """Decades with labels at 1, 2 and 5 only, as plain numbers: matplotlib's own overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def tile(images: NDArray[np.uint8], columns: int, scale: int) -> NDArray[np.uint8]:
    """(N, C, H, W) -> one RGB picture of tiles, `scale` times upscaled, with 2 pixels between."""
    count, channels, height, width = images.shape
    big = images.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    lines, gap = math.ceil(count / columns), 2
    step_y, step_x = height * scale + gap, width * scale + gap
    picture = np.full((lines * step_y - gap, columns * step_x - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(big):
        top, left = index // columns * step_y, index % columns * step_x
        picture[top : top + height * scale, left : left + width * scale] = image
    return picture


DPI = 100


def _figure(width: int, height: int) -> "Figure":
    """A white figure of so many pixels, drawn by Agg whatever the user's display and style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _fitted_text(
    figure: "Figure", left: int, baseline: int, text: str, room: int, style: dict[str, Any]
) -> None:
    """Text at pixels from the top left; shrunk a little, then cut, until `room` pixels hold it."""
    width, height = figure.get_size_inches() * DPI
    drawn = figure.text(left / width, 1 - baseline / height, text, va="baseline", **style)
    size = float(style["fontsize"])
    smallest = 0.8 * size
    while drawn.get_window_extent().width > room and len(text) > 1:
        if size > smallest:
            size -= 0.5
            drawn.set_fontsize(size)
        else:
            text = text[:-1]
            drawn.set_text(f"{text.rstrip()}…")


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        # No version of matplotlib inside: the same picture has the same bytes after an upgrade.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
