"""Pictures: grids of samples, whole as PNG files and tiled for the page."""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.files import atomic_path
from fewstep.paths import SAMPLES
from fewstep.report.text import Row, is_missing, row_caption

if TYPE_CHECKING:  # matplotlib takes a second to import: only the figures pay for it
    from matplotlib.figure import Figure

    from fewstep.data.lmdb import ImageDataset

INK, MUTED = "#1a1a1a", "#6b6b6b"
COLUMNS = 10  # of a sample grid, at most
PIXELS = 2_500_000  # of all sample grids together: what keeps the page below 5 MB
DPI, GAP = 100, 2


@dataclass(frozen=True)
class Picture:
    """Images of a row as tiles, and what stands above them."""

    name: str
    caption: str
    images: NDArray[np.uint8]
    columns: int

    def slide(self) -> dict[str, str]:
        """What the page's template shows."""
        src = png_uri(tile(self.images, self.columns, enlargement(self.images)))
        alt = f"{len(self.images)} images: {self.name}"
        return {"name": self.name, "caption": self.caption, "src": src, "alt": alt}


def sample_pictures(
    rows: Sequence[Row], dataset: "ImageDataset", images: int, classes: int
) -> list[Picture]:
    """Real images, then each row's images of the same seeds and classes.

    Args:
        images: that every row has; as many as fit the page are shown.
        classes: of the data: where they are few, a column of tiles has one class.
    """
    whole = COLUMNS - COLUMNS % classes if 0 < classes < COLUMNS else COLUMNS
    columns = min(whole, images)
    lines = min(lines_that_fit(len(rows) + 1, columns, dataset.shape), images // columns)
    pictures, labels = [], np.empty(0, np.int64)
    for row in rows:
        shown, labels = row_images(row["row"], slice(columns * lines))
        pictures.append(Picture(row["row"], row_caption(row), shown, columns))
    real = real_images(dataset, labels)
    return [Picture("real images", "of the same classes", real, columns), *pictures]


def row_images(
    name: str, places: slice | list[int]
) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Some of a row's images, (N, C, H, W), and their classes."""
    with np.load(SAMPLES / f"{name}.npz") as samples:
        return samples["images"][places], samples["labels"][places]


def real_images(dataset: "ImageDataset", labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Real images of these labels, different ones as far as there are, uint8 (N, C, H, W)."""
    known = dataset.labels()  # seconds for ImageNet, hence once and not for each class
    # again from the first where a class has fewer images than are shown
    places = {label: cycle(np.flatnonzero(known == label)) for label in set(labels.tolist())}
    return dataset.read(np.array([next(places[label]) for label in labels.tolist()]))[0]


def neighbour_pictures(rows: Sequence[Row], dataset: "ImageDataset") -> list[Picture]:
    """For each row its samples that are nearest to training images, and those below them."""
    pictures = []
    for row in rows:
        if is_missing(near := row.get("neighbours")) or not near:
            continue
        lines = [row_images(row["row"], [n["image"] for n in near])[0]]
        lines += [dataset.read(line)[0] for line in np.array([n["training"] for n in near]).T]
        seeds = ", ".join(str(n["seed"]) for n in near)
        share = row["metrics.memorised.value"]
        caption = f"{row['nfe']} NFE · {share:.2%} near-duplicates. Seeds {seeds}"
        pictures.append(Picture(row["row"], caption, np.concatenate(lines), len(near)))
    return pictures


def draw_samples(pictures: Sequence[Picture], folder: Path, title: str) -> None:
    """samples.png with all pictures, and one PNG in grids/ for each row."""
    columns, lines = pictures[0].columns, len(pictures[0].images) // pictures[0].columns
    panels = {picture.name: picture.images for picture in pictures}
    captions = {picture.name: picture.caption for picture in pictures[1:]}
    size: dict[str, Any] = {"columns": columns, "lines": lines}
    sample_grid(panels, captions, folder / "samples.png", **size, title=title)
    for name in captions:
        sample_grid({name: panels[name]}, captions, folder / "grids" / f"{name}.png", **size)


def lines_that_fit(pictures: int, columns: int, shape: tuple[int, ...], most: int = 5) -> int:
    """Lines of every sample grid so that all together stay within the page's size; at least 1."""
    overhead = 1 if round(48 / shape[-1]) <= 1 else 1.2  # of enlarged images in a PNG
    bytes_a_line = pictures * columns * int(np.prod(shape)) * overhead
    return max(1, min(most, int(PIXELS / bytes_a_line)))


def enlargement(images: NDArray[np.uint8]) -> int:
    """The whole number that brings small images to about 48 pixels."""
    return max(1, round(48 / images.shape[-1]))


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as an address that holds it."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if (pixels[..., :1] == pixels).all():
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


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
    _check_grid(samples, shown)
    scale = enlargement(next(iter(samples.values())))
    panels = [tile(images[:shown], columns, scale) for images in samples.values()]
    height, width = panels[0].shape[:2]
    across = min(panels_across, len(panels))
    margin, gutter, head, label = 28, 28, 44 if title else 8, 46
    down = math.ceil(len(panels) / across)
    canvas_width = 2 * margin + across * width + (across - 1) * gutter
    canvas_height = head + down * (label + height + gutter // 2) + margin - gutter // 2

    canvas = np.full((canvas_height, canvas_width, 3), 255, dtype=np.uint8)
    figure = white_figure(canvas_width, canvas_height)
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
    save_png(figure, path)


def _check_grid(samples: Mapping[str, NDArray[np.uint8]], shown: int) -> None:
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


def tile(images: NDArray[np.uint8], columns: int, scale: int) -> NDArray[np.uint8]:
    """(N, C, H, W) -> one RGB picture of tiles, `scale` times upscaled, with GAP pixels between."""
    count, channels, height, width = images.shape
    big = images.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    lines = math.ceil(count / columns)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    picture = np.full((lines * step_y - GAP, columns * step_x - GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(big):
        top, left = index // columns * step_y, index % columns * step_x
        picture[top : top + height * scale, left : left + width * scale] = image
    return picture


def white_figure(width: int, height: int) -> "Figure":
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


def save_png(figure: "Figure", path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        # No version of matplotlib inside: the same picture has the same bytes after an upgrade.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
