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

from fewstep.budgets import IMAGE

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_BYTES = IMAGE
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What decoding may have to change in an image, as the manifest counts it. New ones go to the end:
# interrupted builds keep their places in this list.
UPRIGHT, FIRST_FRAME, OVER_WHITE = "turned upright", "first of several frames", "laid over white"
FROM_CMYK, FROM_PALETTE, TO_GREY, TO_RGB = "from CMYK", "from a palette", "to grey", "grey to RGB"
CHANGES = (UPRIGHT, FIRST_FRAME, OVER_WHITE, FROM_CMYK, FROM_PALETTE, TO_GREY, TO_RGB)
_FROM = {"CMYK": FROM_CMYK, "P": FROM_PALETTE, "PA": FROM_PALETTE}


class Part(Protocol):
    """Where the bytes of one image file are; small and picklable, because workers receive it.

    `where` names the file in messages and in the manifest.
    """

    @property
    def where(self) -> str: ...
    @property
    def label(self) -> int: ...
    def read(self) -> bytes: ...


@dataclass(frozen=True)
class Decoding:
    """The size of decoded images; `fit` crops and resizes to it, otherwise it is required."""

    channels: int
    resolution: int
    fit: bool


@dataclass(frozen=True)
class Decoded:
    """An image, uint8 (C, H, W), and its label; or the reason why there is no image.

    Attributes:
        changes: which of CHANGES the decoding took.
    """

    where: str
    label: int
    image: np.ndarray | None
    reason: str = ""
    changes: tuple[str, ...] = ()


def decode_image(data: bytes, how: Decoding) -> np.ndarray:
    """An image file as uint8 (C, H, W): what a viewer shows, whatever the format.

    - An orientation in EXIF is applied.
    - Transparent pixels are laid over white; what colour they hide is never seen.
    - More than 8 bits a channel are refused, because half of them would be lost.
    - Of an animation, or several pictures in one file, the first is taken.
    - Palettes, CMYK, grey and colours become what `how.channels` asks for, as PIL converts them;
      colour profiles and gamma are ignored.

    Fitting does what EDM's dataset tool does: crop the central square, then resize with Lanczos.
    That tool knows grey and RGB alone: it stops at images with an alpha channel or CMYK, takes the
    numbers of a palette for grey, and leaves photographs lying on their side. Files without any of
    these give the bytes that it gives.

    Raises:
        ValueError: damaged, not PNG, JPEG or WebP, more than 8 bits a channel; or, without `fit`,
            another size or another number of channels.
    """
    return decode_and_tell(data, how)[0]


def decode_and_tell(data: bytes, how: Decoding) -> tuple[np.ndarray, tuple[str, ...]]:
    """As `decode_image`, and which of CHANGES it took."""
    mode = _MODES[how.channels]
    try:
        # `formats` keeps PIL's other decoders, which have a history of security bugs, away from
        # untrusted files.
        with Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values()))) as image:
            # PIL halves the 16 bits of PNGs with colours without a word
            if image.mode.startswith(("I", "F")) or image.format == "PNG" and data[24] > 8:
                raise ValueError("has more than 8 bits a channel; convert it to 8")
            image.load()
            told = [FIRST_FRAME] if getattr(image, "n_frames", 1) > 1 else []
            upright = _upright(image, told)
            got = f"{upright.mode} {upright.width}x{upright.height}"
            need = f"{mode} {how.resolution}x{how.resolution}"
            if not how.fit and got != need:
                raise ValueError(f"need {need}, got {got}")
            pixels = np.asarray(_fit(_converted(upright, mode, told), how.resolution))
    except ValueError:
        raise
    except UnidentifiedImageError:  # its own message contains a memory address
        raise ValueError(_unknown(data)) from None
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from error
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)), tuple(told)


def _upright(image: Image.Image, told: list[str]) -> Image.Image:
    """The image turned and mirrored as its EXIF asks for."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # viewers show an image with damaged EXIF as it lies
        return image
    if turn is None:
        return image
    told.append(UPRIGHT)
    return image.transpose(turn)


def _converted(image: Image.Image, mode: str, told: list[str]) -> Image.Image:
    """The image in `mode`, grey or RGB, without transparency."""
    if image.mode in _FROM:
        told.append(_FROM[image.mode])
    if (grey := image.mode in ("1", "L", "LA")) is not (mode == "L"):
        told.append(TO_RGB if grey else TO_GREY)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        seen = image.convert("RGBA")
        if np.asarray(seen)[..., 3].min() < 255:
            told.append(OVER_WHITE)
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
            image = image.convert("RGB")
    return image.convert(mode)


def _unknown(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "is a damaged JPEG, or one that has more than 8 bits a channel"
    return "is not a PNG, JPEG or WebP image"


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
    """The images of all chunks, in the same order for any number of processes.

    Args:
        chunks: read on demand; at most two per worker are in flight, which bounds the memory.
        workers: processes; with 1, this process decodes.

    Raises:
        ValueError: a process died.
    """
    if workers == 1:
        for chunk in chunks:
            yield from _decode(chunk, how)
        return
    in_flight: deque[Future[list[Decoded]]] = deque()
    # spawn, not fork: a forked child could inherit a lock held by one of torch's threads
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_signals)
    try:
        for chunk in chunks:
            in_flight.append(pool.submit(_decode, chunk, how))
            if len(in_flight) >= 2 * workers:
                yield from in_flight.popleft().result()
        while in_flight:
            yield from in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"need {workers} processes until the end, got one that died, perhaps out of memory "
            "(params.yaml: data.workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(parts: list[Part], how: Decoding) -> list[Decoded]:
    return [_decode_one(part, how) for part in parts]


def _decode_one(part: Part, how: Decoding) -> Decoded:
    try:
        image, changes = decode_and_tell(part.read(), how)
        return Decoded(part.where, part.label, image, changes=changes)
    except OSError as error:
        return Decoded(part.where, part.label, None, f"cannot be read: {error.strerror}")
    except ValueError as error:
        return Decoded(part.where, part.label, None, str(error))


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops the workers
