"""Sources that are read front to back, because their images have to be decoded first."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fewstep.data.decode import Decoded, Decoding, Part, decode_chunks

_CHUNK = 128  # images a process decodes at a time: amortises the cost of pickling


@dataclass(frozen=True)
class Stream(ABC):
    """A `Source` in the order of its files; `ingest` reads it once and can start anywhere.

    Attributes:
        name: what the LMDB's metadata and the manifest call the source.
        shape: (C, H, W) of every image.
        labels: class of every image, (N,), in [0, classes).
        fingerprint: changes when the files do; an interrupted build compares it before resuming.
        note: a caveat for the readers of the manifest.
        class_names: one for each class, or none.
    """

    name: str
    shape: tuple[int, int, int]
    labels: np.ndarray
    classes: int
    fingerprint: str
    note: str
    class_names: tuple[str, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, start: int, workers: int) -> Iterator[Decoded]:
        """The images from `start` on, in order, decoded by that many processes."""

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        decoded = next(self.read(range(len(self))[index], workers=1))
        if decoded.image is None:
            raise unreadable(decoded.where, decoded.reason, self.name)
        return decoded.image, decoded.label


@dataclass(frozen=True)
class FileStream(Stream):
    """Image files in a folder, a zip or parquet shards.

    Attributes:
        part: where image i is. Called per chunk, because a million parts would fill memory.
        fit: crop and resize the images; otherwise they must have the right size already.
    """

    part: Callable[[int], Part]
    fit: bool

    def __post_init__(self) -> None:
        if (channels := self.shape[0]) not in (1, 3):
            raise ValueError(f"need 1 or 3 channels, got {channels} (params.yaml: data.channels)")

    def read(self, start: int, workers: int) -> Iterator[Decoded]:
        channels, resolution, _ = self.shape
        every = range(start, len(self))
        chunks = (
            [self.part(i) for i in every[first : first + _CHUNK]]
            for first in range(0, len(every), _CHUNK)
        )
        return decode_chunks(chunks, Decoding(channels, resolution, self.fit), workers)


def unreadable(where: str, reason: str, source: str) -> ValueError:
    return ValueError(
        f"need readable images, got {where} in {source}: {reason}; repair it, or skip such images "
        "with on_error: skip (params.yaml: data.on_error)"
    )


def state_of(file: Path) -> list[str | int]:
    """Name, size and modification time: hashing the content would take as long as the build."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def fingerprint(*facts: Iterable[object]) -> str:
    """sha256 of sequences of names, sizes and times."""
    sha = hashlib.sha256()
    for fact in facts:
        for item in fact:
            sha.update(json.dumps(item).encode() + b"\n")
    return sha.hexdigest()
