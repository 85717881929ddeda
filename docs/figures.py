"""The pictures of the README and of docs/methods.md; prints the README's table.

`python docs/figures.py`, after `make repro`.
`segment` and `scores` are of a world with one pixel, whose images are -0.6 or 0.6, give or take
0.1. There the best denoiser is known in closed form. The others are of the default's networks.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fewstep.networks.weights import load_model
from fewstep.params import load_params
from fewstep.report.charts import FAINT, PALETTE
from fewstep.report.frames import rows_frame
from fewstep.report.pictures import INK, MUTED, row_images, save_png, tile, white_figure
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SeededNoise, to_uint8
from fewstep.theory.solve import heun_step

OUT = Path(__file__).parent / "figures"
MEANS, STD = torch.tensor([-0.6, 0.6]), 0.1
BLUE, RED, GREEN, *_ = PALETTE


def weights_of(x: Tensor, sigma: Tensor, means: Tensor = MEANS, std: float = STD) -> Tensor:
    """Unnormalised density of each part of the noised mixture at x (...), as (..., parts)."""
    spread = (std**2 + sigma**2) ** 0.5
    z = (x[..., None] - means) / spread
    return torch.exp(-(z**2) / 2) / spread


def denoise(x: Tensor, sigma: Tensor, means: Tensor = MEANS, std: float = STD) -> Tensor:
    """E[y | x] of the mixture: what a perfect teacher answers."""
    share = weights_of(x, sigma, means, std)
    parts = means + std**2 / (std**2 + sigma**2) * (x[..., None] - means)
    return (share * parts).sum(-1) / share.sum(-1)


def path(x: Tensor, sigmas: Tensor) -> Tensor:
    """The teacher's trajectory from x through those noise levels."""
    xs = [x]
    for before, after in zip(sigmas, sigmas[1:], strict=False):
        xs.append(heun_step(denoise, xs[-1], before, after))
    return torch.stack(xs)


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, which="both")


def segment() -> Figure:
    """Trajectories, the student's steps, and one hop of the teacher in one segment."""
    figure = white_figure(760, 340)
    axes = figure.subplots()
    plain(axes)
    schedule = Schedule(0.05, 5.0, 7.0)
    fine = torch.tensor(np.geomspace(5.0, 0.03, 120))
    for start in np.linspace(-9, 9, 13):
        xs = path(torch.tensor(start), fine)
        axes.plot(fine, xs, color=FAINT, linewidth=1, zorder=1)
    for node in schedule.sigmas(4):
        axes.axvline(float(node), color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    nodes = schedule.sigmas(4)
    last, t, s = nodes[2], nodes[1] * 0.82, nodes[1] * 0.55
    through = path(torch.tensor(6.0), torch.cat([torch.tensor([5.0]), nodes[1:2], t[None]]))
    x_t = through[-1]
    x_s = heun_step(denoise, x_t, t, s)
    end = path(x_s, torch.tensor(np.geomspace(float(s), float(last), 30)))[-1]
    guess = end - 0.22
    axes.plot([t, s], [x_t, x_s], color=RED, linewidth=2.5, zorder=3)
    axes.plot([s, last], [x_s, end], color=BLUE, linewidth=1.8, linestyle="--", zorder=3)
    axes.plot([t, last], [x_t, guess], color=GREEN, linewidth=1.8, linestyle="--", zorder=2)
    axes.scatter([t, s, last, last], [x_t, x_s, end, guess], s=18, color=INK, zorder=4)
    notes = (
        (t * 1.02, x_t + 1.1, "1  a noised image", INK),
        (s * 1.1, x_s + 0.9, "2  the teacher hops", RED),
        (last * 0.95, end + 0.7, "3  the student goes on from there:\n    the target", BLUE),
        (last * 0.95, guess - 0.5, "4  the student at once:\n    is to be equal", GREEN),
    )
    for left, up, note, color in notes:
        axes.text(float(left), float(up), note, color=color, fontsize=9, va="center")
    axes.set_xscale("log")
    axes.set_xlim(5.2, 0.028)
    axes.set_ylim(-3, 4)
    axes.set_xlabel("sigma (noise); dotted: the student's steps", color=MUTED, fontsize=9)
    axes.set_ylabel("the pixel", color=MUTED, fontsize=9)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.97, bottom=0.15)
    return figure


def scores() -> Figure:
    """Real and generated densities at three noise levels, and the direction between them."""
    figure = white_figure(760, 250)
    fake = torch.tensor([-0.25, 0.6]), 0.25
    x = torch.linspace(-2.2, 2.2, 400, dtype=torch.float64)
    for axes, sigma in zip(figure.subplots(1, 3), (0.1, 0.5, 2.0), strict=True):
        plain(axes)
        level = torch.tensor(sigma)
        spread = x * max(1.0, sigma * 1.5)
        real, made = (weights_of(spread, level, *of).sum(-1) for of in ((MEANS, STD), fake))
        top = float(torch.maximum(real, made).max())
        axes.plot(spread, real, color=BLUE, label="real")
        axes.plot(spread, made, color=RED, label="generated")
        at = spread[40:-40:45]
        direction = denoise(at, level) - denoise(at, level, *fake)
        length = 0.2 * float(spread[-1]) / float(direction.abs().max())
        axes.quiver(
            at, torch.full_like(at, -0.1 * float(top)), direction * length, torch.zeros_like(at),
            angles="xy", scale_units="xy", scale=1, color=INK, width=0.008,
        )  # fmt: skip
        axes.set_ylim(-0.2 * top, 1.1 * top)
        axes.set_yticks([])
        axes.set_title(f"sigma {sigma:g}", fontsize=9, color=MUTED)
    figure.axes[2].legend(fontsize=8, frameon=False, loc="upper right")
    figure.subplots_adjust(left=0.02, right=0.99, top=0.9, bottom=0.1, wspace=0.08)
    return figure


@torch.no_grad()
def one_step(images: int = 20) -> Figure:
    """The teacher's answer to pure noise of different strength, in one call."""
    params = load_params("params.yaml")
    teacher, _ = load_model("teacher", params)
    shape = (params.data.channels, params.data.resolution, params.data.resolution)
    z = SeededNoise(range(images), shape)()
    labels = torch.eye(params.data.classes)[torch.arange(images) % params.data.classes]
    lines = {
        f"sigma {sigma:g}": to_uint8(
            teacher(sigma * z, torch.full((images,), sigma), labels)
        ).numpy()
        for sigma in (80.0, 10.0, 2.5, 1.0)
    }
    return in_lines(lines, 60)


def front(images: int = 20) -> Figure:
    """The same seeds by the teacher in 35, 8 and 1 network calls and by students in 10, 8 and 1."""
    rows = {
        "teacher, 35 calls": "teacher-heun-35",
        "teacher, 8 calls": "teacher-euler-8",
        "teacher, 1 call": "teacher-euler-1",
        "dmd2-10": "dmd2-10",
        "cd-8": "cd-8",
        "mm-8": "mm-8",
        "dmd2-1": "dmd2-1",
    }
    return in_lines({name: row_images(row, slice(images))[0] for name, row in rows.items()}, 160, 3)


def in_lines(lines: Mapping[str, NDArray[np.uint8]], left: int, scale: int = 2) -> Figure:
    """A line of images (N, C, H, W) for each name, which stands in so many pixels before it."""
    shown = np.concatenate(list(lines.values()))
    picture = tile(shown, len(shown) // len(lines), scale)
    height, width = picture.shape[:2]
    figure = white_figure(width + left, height)
    figure.figimage(picture, left, 0)
    for line, name in enumerate(lines):
        middle = 1 - (line + 0.5) / len(lines)
        figure.text(0.005, middle, name, fontsize=4 * scale, va="center", color=INK)
    return figure


def quality() -> Figure:
    """Distance by network calls, of the teacher's samplers and of each student."""
    rows = rows_frame(load_params("params.yaml").rows)
    rows = rows[rows["guidance_scale"] == 1]
    figure = white_figure(520, 300)
    axes = figure.subplots()
    plain(axes)
    euler = rows[(rows["student"] == "teacher") & (rows["sampler"] == "euler")].sort_values("nfe")
    axes.plot(euler["nfe"], euler["value"], color=MUTED, marker="o", markersize=4)
    axes.text(4.3, float(euler["value"].max()) / 5, "teacher, Euler", color=MUTED, fontsize=9)
    best = float(rows["value"]["teacher-heun-35"])
    axes.axhline(best, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1, best * 0.84, "teacher, 35 calls", color=MUTED, fontsize=9, va="top")
    students = rows[rows["student"] != "teacher"].sort_values("value")
    for (name, row), color in zip(students.iterrows(), PALETTE, strict=False):
        axes.errorbar(row["nfe"], row["value"], row["std"], color=color, marker="o", zorder=3)
        beside = students[students["nfe"] == row["nfe"]]
        up = 14 * list(beside.index).index(name) - 7 * (len(beside) - 1)  # one above the other
        up = up if len(beside) > 1 else 9  # above the teacher's line
        left = len(beside) > 1  # where there is room: more calls are close to the right
        place = {"xytext": (-7 if left else 7, up), "textcoords": "offset points", "va": "center"}
        place["ha"] = "right" if left else "left"
        axes.annotate(str(name), (row["nfe"], row["value"]), color=color, fontsize=9, **place)
    axes.set_ylim(0.6 * best, 1.5 * float(rows["value"].max()))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks := [1, 2, 4, 8, 10, 16], [str(tick) for tick in ticks])
    axes.set_xlabel("network calls an image", color=MUTED, fontsize=9)
    axes.set_ylabel(f"{rows['metric'].iloc[0]}, lower is better", color=MUTED, fontsize=9)
    figure.subplots_adjust(left=0.13, right=0.97, top=0.97, bottom=0.15)
    return figure


def table() -> str:
    """The README's table: each row beside the teacher's 35 network calls, in Markdown."""
    rows = rows_frame(load_params("params.yaml").rows)
    best = rows["value"]["teacher-heun-35"]
    shown = pd.DataFrame({
        "network calls": rows["nfe"],
        rows["metric"].iloc[0]: [
            f"{v:.2f} ± {std:.2f}" for v, std in zip(rows["value"], rows["std"], strict=True)
        ],
        "× teacher": [f"{v / best:.2f}" for v in rows["value"]],
        "trained on, kimg": [
            "" if student == "teacher" else f"{kimg:.0f}"
            for student, kimg in zip(rows["student"], rows["kimg"], strict=True)
        ],
    })  # fmt: skip
    return shown.rename_axis("row").to_markdown(disable_numparse=True)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for draw in (segment, scores, one_step, front, quality):
        save_png(draw(), OUT / f"{draw.__name__}.png")
    print(table())


if __name__ == "__main__":
    main()
