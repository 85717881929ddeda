"""Downsampled ImageNet (Chrabaszcz et al. 2017): train_data_batch_*.npz of flat uint8 images.

Its images were made with a box filter, EDM's with a centre crop and Lanczos. So it is not the
distribution that EDM's teachers were trained on and the FID references describe.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fewstep.arrays import DAMAGE, open_arrays
from fewstep.budgets import LISTING, read_small
from fewstep.data.decode import Decoded
from fewstep.data.labelled import check_labels, classes_in
from fewstep.data.stream import Stream, fingerprint, state_of
from fewstep.quoting import printable

MAPPING = "map_clsloc.txt"  # by the data set's authors: synset, label and name on each line
_NAMED = re.compile(r"train_data_batch_[0-9]{1,4}\.npz")
_BATCHES = 10  # of the whole data set, 1,281,167 images
_ROWS = 256  # images read at a time
_BOX = "images made with a box filter, not with EDM's centre crop and Lanczos"


@dataclass(frozen=True)
class BatchStream(Stream):
    """The rows of the batch files, one file after the other."""

    files: list[Path]
    counts: list[int]

    def read(self, start: int, workers: int) -> Iterator[Decoded]:
        """The images from `start` on. Nothing is decoded, so other processes would not help."""
        first = 0
        for file, count in zip(self.files, self.counts, strict=True):
            rows = _rows(file, count, max(start - first, 0), self.shape)
            for i, image in enumerate(rows, max(start, first)):
                yield Decoded(f"{file.name}, row {i - first}", int(self.labels[i]), image)
            first += count


def batches(path: Path) -> list[Path]:
    """The train_data_batch_*.npz that `path` is or holds, by number; [] if none."""
    files = [path] if path.is_file() else path.glob("train_data_batch_*.npz")
    return sorted((file for file in files if _NAMED.fullmatch(file.name)), key=_number)


def _number(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def _check_numbers(path: Path, files: list[Path]) -> str:
    """Refuse a folder that lacks a batch between others; a note if the last ones are not there."""
    numbers = [_number(file) for file in files]
    missing = sorted(set(range(1, numbers[-1])) - set(numbers))
    if missing or len(set(numbers)) < len(numbers):
        names = ", ".join(f"train_data_batch_{n}.npz" for n in missing)
        got = f"no {names}" if missing else f"two of the same number among {len(files)} files"
        raise ValueError(
            f"need train_data_batch_1.npz to train_data_batch_{numbers[-1]}.npz in {path}, got "
            f"{got} (params.yaml: data.source)"
        )
    return "" if len(files) >= _BATCHES else f"{len(files)} of the data set's {_BATCHES} batches"


def open_batches(path: Path, shape: tuple[int, int, int], classes: int | None) -> BatchStream:
    """The batches of downsampled ImageNet in a folder, or one of them.

    The files' labels 1, 2, ... follow the data set's own order of classes. If `map_clsloc.txt` is
    beside them, they become the standard labels, by synset in alphabetical order. Otherwise they
    keep their order, counted from 0, and the note says so.

    Raises:
        ValueError: damaged files, other shapes, labels that do not fit, or a batch that is missing
            between others.
    """
    files, size = batches(path), int(np.prod(shape))
    share = _check_numbers(path, files) if path.is_dir() else ""
    found = [_labels(file) for file in files]
    for file, labels in zip(files, found, strict=True):
        with _data(file) as (_, have):
            if have != (len(labels), size):
                raise ValueError(
                    f"need data ({len(labels)}, {size}) in {file}, got {have} "
                    "(params.yaml: data.resolution, data.channels)"
                )
    own = np.concatenate(found) - 1
    classes = classes_in(own) if classes is None else classes
    labels, note = _standard(own, files[0].with_name(MAPPING), classes)
    note = "; ".join(filter(None, (note, share)))
    facts = fingerprint(map(state_of, files), shape, labels.tolist())
    counts = [len(batch) for batch in found]
    return BatchStream(path.name, shape, labels, classes, facts, note, files, counts)


def _labels(file: Path) -> np.ndarray:
    try:
        with open_arrays(file) as arrays:
            labels = arrays["labels"]
            if len(labels.shape) != 1 or labels.dtype.kind not in "iu":
                raise ValueError(f"labels {labels.dtype} {labels.shape}")
            return labels.read().astype(np.int64)
    except DAMAGE as error:
        raise _damaged(file, error) from error


def _rows(file: Path, count: int, start: int, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """The images of a batch from `start` on, without the batch (1.6 GB at 64x64) in memory."""
    size = int(np.prod(shape))
    with _data(file) as (data, _):
        try:
            # In a compressed file, seek decompresses everything before: seconds, once per resume.
            data.seek(data.tell() + start * size)
            for first in range(start, count, _ROWS):
                need = min(_ROWS, count - first) * size
                if len(raw := data.read(need)) != need:
                    raise EOFError(f"{len(raw)} bytes instead of {need}")
                yield from np.frombuffer(raw, np.uint8).reshape(-1, *shape)
        except DAMAGE as error:
            raise _damaged(file, error) from error


@contextmanager
def _data(file: Path) -> Generator[tuple[IO[bytes], tuple[int, ...]]]:
    """The array `data` of a batch as a file, positioned after its header, and its shape."""
    with ExitStack() as stack:
        try:
            data = stack.enter_context(open_arrays(file))["data"]
            if data.fortran or data.dtype != np.uint8:
                raise ValueError(f"data of {data.dtype}, fortran_order {data.fortran}")
            content = stack.enter_context(data.archive.open("data.npy"))
            content.seek(data.start)
        except DAMAGE as error:
            raise _damaged(file, error) from error
        yield content, data.shape


def _standard(labels: np.ndarray, mapping: Path, classes: int) -> tuple[np.ndarray, str]:
    """Labels in the standard order if there is a mapping, and the manifest's note on them."""
    check_labels(labels, classes, mapping.parent)
    if not mapping.is_file():
        order = f"labels in the data set's own order, as there is no {MAPPING}"
        return labels, f"{_BOX}; {order}: class k is not class k of EDM's teachers"
    try:
        text = read_small(mapping, LISTING[0], MAPPING).decode()
        lines = [line.split() for line in text.splitlines() if line.strip()]
        synsets = {int(line[1]) - 1: line[0] for line in lines}
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"need lines of synset, label and name in {mapping}, got {printable(str(error))} "
            "(params.yaml: data.source)"
        ) from error
    standard = {synset: i for i, synset in enumerate(sorted(synsets.values()))}
    if sorted(synsets) != list(range(classes)) or len(standard) != classes:
        raise ValueError(
            f"need {classes} synsets with labels 1 to {classes} in {mapping}, got {len(lines)} "
            "lines (params.yaml: data.classes)"
        )
    return np.array([standard[synsets[i]] for i in range(classes)])[labels], _BOX


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"need data (N, C*H*W) uint8 and labels (N,) integers in {file}, got "
        f"{printable(str(error), keep='') or type(error).__name__} (params.yaml: data.source)"
    )
