"""Image files as uint8 (C, H, W), decoded by several processes in a fixed order."""

import io
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_BYTES = 1 << 28  # of one image file; more is a mistake or an attack
_MODES = {1: "L", 3: "RGB"}


class Part(Protocol):
    """Where the bytes of one image file are. Small, and can be pickled."""

    @property
    def where(self) -> str:
        """How messages and the manifest call the file."""
        ...

    @property
    def label(self) -> int: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class Decoding:
    """What images become: `fit` crops and resizes, else they must have this size already."""

    channels: int
    resolution: int
    fit: bool


@dataclass(frozen=True)
class Decoded:
    """An image, uint8 (C, H, W), and its label; or the reason why there is none."""

    where: str
    label: int
    image: np.ndarray | None
    reason: str = ""


def decode_image(data: bytes, how: Decoding) -> np.ndarray:
    """An image file as uint8 (C, H, W).

    Fitting is what EDM's dataset tool does: the centre square of the short side, then Lanczos.

    Raises:
        ValueError: damaged, not PNG, JPEG or WebP, more than 8 bits a channel; or, without `fit`,
            another size or another number of channels.
    """
    mode = _MODES[how.channels]
    try:
        with Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values()))) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"need 8 bits a channel, got mode {image.mode}")
            got = f"{image.mode} {image.width}x{image.height}"
            need = f"{mode} {how.resolution}x{how.resolution}"
            if not how.fit and got != need:
                raise ValueError(f"need {need}, got {got}")
            pixels = np.asarray(_fit(image.convert(mode), how.resolution))
    except ValueError:
        raise
    except UnidentifiedImageError:  # whose message has an address of memory in it
        raise ValueError("is no PNG, JPEG or WebP") from None
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def _fit(image: Image.Image, resolution: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return image
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def decode_chunks(chunks: Iterable[list[Part]], how: Decoding, workers: int) -> Iterator[Decoded]:
    """The images of all chunks, in their order whatever the number of processes.

    Args:
        chunks: read as they are needed: two for each worker are under way at any time.
        workers: processes; 1 decodes in this one.

    Raises:
        ValueError: a process died.
    """
    if workers == 1:
        for chunk in chunks:
            yield from _decode(chunk, how)
        return
    under_way: deque[Future[list[Decoded]]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_signals)
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_decode, chunk, how))
            if len(under_way) >= 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"need {workers} processes to the end, got one that died, of too little memory perhaps "
            "(params.yaml: data.workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(parts: list[Part], how: Decoding) -> list[Decoded]:
    return [_decode_one(part, how) for part in parts]


def _decode_one(part: Part, how: Decoding) -> Decoded:
    try:
        return Decoded(part.where, part.label, decode_image(part.read(), how))
    except OSError as error:
        return Decoded(part.where, part.label, None, f"cannot be read: {error.strerror}")
    except ValueError as error:
        return Decoded(part.where, part.label, None, str(error))


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
