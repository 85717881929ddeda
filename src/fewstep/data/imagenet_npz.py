"""Downsampled ImageNet (Chrabaszcz et al. 2017): train_data_batch_*.npz of flat uint8 images.

Its images were made by box filtering, those of EDM by a centre crop and Lanczos: another
distribution than the one that EDM's teachers and FID references know.
"""

import re
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from fewstep.data.decode import Decoded
from fewstep.data.lmdb import check_labels
from fewstep.data.stream import Stream, fingerprint

MAPPING = "map_clsloc.txt"  # of the data set's authors: synset, label, name, a line each
_ROWS = 256  # images read at a time
_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError)
_BOX = "images made by box filtering, not by EDM's centre crop and Lanczos"


@dataclass(frozen=True)
class BatchStream(Stream):
    """The rows of the batches, one after the other; labels (N,) are known beforehand."""

    files: list[Path]
    counts: list[int]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, workers: int) -> Iterator[Decoded]:
        """The images from `start` on. There is nothing to decode: other processes cannot help."""
        first = 0
        for file, count in zip(self.files, self.counts, strict=True):
            rows = _rows(file, count, max(start - first, 0), self.shape)
            for i, image in enumerate(rows, max(start, first)):
                yield Decoded(f"{file.name}, row {i - first}", int(self.labels[i]), image)
            first += count


def batches(path: Path) -> list[Path]:
    """The train_data_batch_*.npz that `path` names or holds, by number; [] if none."""
    files = [path] if path.is_file() else path.glob("train_data_batch_*.npz")
    named = [(re.fullmatch(r"train_data_batch_([0-9]+)\.npz", file.name), file) for file in files]
    return [file for _, file in sorted((int(match[1]), file) for match, file in named if match)]


def open_batches(path: Path, resolution: int, channels: int, classes: int) -> BatchStream:
    """The batches of downsampled ImageNet in a folder, or one of them.

    Labels 1, 2, ... count in the data set's own order. With `map_clsloc.txt` beside the batches
    they become the standard ones, by synset in alphabetical order; else they count from 0 in the
    order that they have, which the note says.

    Raises:
        ValueError: damaged files, other shapes, or labels that do not fit.
    """
    files = batches(path)
    shape = (channels, resolution, resolution)
    found = [_labels(file) for file in files]
    for file, labels in zip(files, found, strict=True):
        with _member(file, "data.npy") as (_, have):
            if have != (len(labels), int(np.prod(shape))):
                raise ValueError(
                    f"need data ({len(labels)}, {np.prod(shape)}) in {file}, got {have} "
                    "(params.yaml: data.resolution, data.channels)"
                )
    labels, note = _standard(np.concatenate(found) - 1, files[0].with_name(MAPPING), classes)
    status = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    facts = fingerprint(status, shape, labels.tolist())
    counts = [len(batch) for batch in found]
    return BatchStream(path.name, shape, classes, facts, note, files, counts, labels)


def _labels(file: Path) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            labels = np.asarray(arrays["labels"])
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels {labels.dtype} {labels.shape}")
        return labels.astype(np.int64)
    except _DAMAGE as error:
        raise _damaged(file, error) from error


def _rows(file: Path, count: int, start: int, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """The images of a batch from `start` on, without holding the batch in memory."""
    size = int(np.prod(shape))
    with _member(file, "data.npy") as (data, _):
        try:
            data.seek(data.tell() + start * size)
            for first in range(start, count, _ROWS):
                need = min(_ROWS, count - first) * size
                if len(raw := data.read(need)) != need:
                    raise EOFError(f"{len(raw)} bytes where {need} should be")
                yield from np.frombuffer(raw, np.uint8).reshape(-1, *shape)
        except _DAMAGE as error:
            raise _damaged(file, error) from error


@contextmanager
def _member(file: Path, name: str) -> Generator[tuple[IO[bytes], tuple[int, ...]]]:
    """A member of a .npz behind its header, and the shape of the uint8 array in it."""
    with zipfile.ZipFile(file) as archive, archive.open(name) as data:
        try:
            read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
            shape, fortran, dtype = read[read_magic(data)](data)
            if fortran or dtype != np.uint8:
                raise ValueError(f"{name} of {dtype}, fortran_order {fortran}")
        except _DAMAGE as error:
            raise _damaged(file, error) from error
        yield data, shape


def _standard(labels: np.ndarray, mapping: Path, classes: int) -> tuple[np.ndarray, str]:
    """Labels in the standard order, if there is a mapping; and what the manifest says of them."""
    if not mapping.is_file():
        check_labels(labels, classes, mapping.parent)
        order = f"labels in the data set's own order, as there is no {MAPPING}"
        return labels, f"{_BOX}; {order}: class k is not class k of EDM's teachers"
    lines = [line.split() for line in mapping.read_text().splitlines() if line.strip()]
    synsets = {int(line[1]) - 1: line[0] for line in lines}
    standard = {synset: i for i, synset in enumerate(sorted(synsets.values()))}
    if sorted(synsets) != list(range(classes)) or len(standard) != classes:
        raise ValueError(
            f"need {classes} synsets with labels 1 to {classes} in {mapping}, got {len(lines)} "
            "lines (params.yaml: data.classes)"
        )
    check_labels(labels, classes, mapping.parent)
    return np.array([standard[synsets[i]] for i in range(classes)])[labels], _BOX


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"need data (N, C*H*W) uint8 and labels (N,) integers in {file}, got "
        f"{error or type(error).__name__} (params.yaml: data.source)"
    )
