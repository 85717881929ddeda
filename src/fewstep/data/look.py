"""What images there are, before anyone says what they should be: for `fewstep new` and `check`."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.arrays import open_arrays
from fewstep.data import cifar
from fewstep.data.decode import FORMATS
from fewstep.data.imagenet_npz import batches
from fewstep.data.labelled import ArraySource, Source
from fewstep.data.lmdb import ImageDataset
from fewstep.data.sources import open_source
from fewstep.data.stream import FileStream, Stream

SAMPLED = 64  # image files that are looked into
_GREY = ("1", "L", "LA")  # PIL's modes


@dataclass(frozen=True)
class Look:
    """What a source holds.

    Attributes:
        images: how many.
        channels: 1 if all images that were looked into are grey, else 3.
        sides: the shorter sides of those images, sorted, in pixels.
        fixed: they have to keep their size; others are cropped and resized.
        counts: images of each class, in order of the labels.
        class_names: one for each class, or none.
    """

    source: str
    images: int
    channels: int
    sides: tuple[int, ...]
    fixed: bool
    counts: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def side(self) -> int:
        """The shorter side that half of the images reach."""
        return self.sides[len(self.sides) // 2]


def look(path: str | Path) -> Look:
    """Look at what `data.source` could name: see `open_source`.

    Image files are not decoded: the headers of at most SAMPLED are read.

    Raises:
        ValueError: no such file, another kind of file, no images, or images that are not square
            and may not be cropped.
    """
    shape = _stored_shape(Path(path))
    channels, side, _ = shape or (3, 1, 1)
    source = open_source(path, side, channels, None)
    sides, fixed = (side,), True
    if isinstance(source, FileStream):
        found = list(_headers(source))
        sides, fixed = tuple(sorted(min(size) for size, _ in found)), not source.fit
        channels = 1 if all(mode in _GREY for _, mode in found) else 3
        if fixed and (odd := next((size for size, _ in found if size != found[0][0]), None)):
            raise ValueError(
                f"need images of one size beside a dataset.json, got {found[0][0]} and {odd} in "
                f"{path} (params.yaml: data.source)"
            )
    counts = np.bincount(_labels(source), minlength=source.classes)
    return Look(
        str(path), len(source), channels, sides, fixed, tuple(counts.tolist()), source.class_names
    )


def _stored_shape(path: Path) -> tuple[int, int, int] | None:
    """(C, H, W) of images that lie decoded in a file; None of image files."""
    if not path.exists():
        return None
    if files := batches(path):
        with open_arrays(files[0]) as arrays:
            pixels = arrays["data"].shape[1] // 3 if "data" in arrays else 0
        return 3, math.isqrt(pixels), math.isqrt(pixels)
    if path.suffix in (".lmdb", ".mdb") or (path / "data.mdb").is_file():
        shape = ImageDataset(path).shape
    elif path.suffix == ".npz" and path.is_file():
        with open_arrays(path) as arrays:
            shape = arrays["images"].shape[1:] if "images" in arrays else ()
        if len(shape) != 3:  # `open_source` says what is wrong
            return None
    elif path.name.endswith(".tar.gz"):
        return cifar.SHAPE
    else:
        return None
    if shape[1] != shape[2]:
        raise ValueError(
            f"need square images, got {shape[1]}x{shape[2]} in {path} (params.yaml: data.source)"
        )
    return shape


def _headers(source: FileStream) -> Iterator[tuple[tuple[int, int], str]]:
    """Size (W, H) and mode of images evenly spread over the source; damaged ones are passed over.

    Raises:
        ValueError: none of them is an image.
    """
    found = 0
    for i in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(np.int64)).tolist():
        try:
            content = io.BytesIO(source.part(i).read())
            with Image.open(content, formats=sorted(set(FORMATS.values()))) as image:
                yield image.size, image.mode
                found += 1
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # on_error decides about it when the data is built
    if not found:
        raise ValueError(
            f"need images that can be read, got none in {source.name} (params.yaml: data.source)"
        )


def _labels(source: Source) -> np.ndarray:
    """All labels (N,) of a source, without its images."""
    if isinstance(source, ImageDataset):
        return source.labels()
    assert isinstance(source, Stream | ArraySource), "these are all kinds of sources"
    return source.labels
