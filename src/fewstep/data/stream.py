"""Sources that are read from front to back, because their images must be decoded first."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fewstep.data.decode import Decoded, Decoding, Part, decode_chunks

_CHUNK = 128  # images that a process decodes at a time


@dataclass(frozen=True)
class Stream(ABC):
    """A `Source` in an order that suits its files; `ingest` reads it once, from any image on.

    Attributes:
        name: what the LMDB's metadata and the manifest call the source.
        shape: (C, H, W) of every image.
        classes: every label is in [0, classes).
        fingerprint: changes when the files do: what an interrupted build compares.
        note: what whoever reads the manifest should know.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    fingerprint: str
    note: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, workers: int) -> Iterator[Decoded]:
        """The images from `start` on, in order, decoded by that many processes."""

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        decoded = next(self.read(range(len(self))[index], workers=1))
        if decoded.image is None:
            raise unreadable(decoded.where, decoded.reason, self.name)
        return decoded.image, decoded.label


class Parts(Protocol):
    """The image files of a source, made when asked for: a million of them would fill memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Part: ...


@dataclass(frozen=True)
class FileStream(Stream):
    """Image files: in a folder, a zip, parquet shards. `fit` crops and resizes them."""

    parts: Parts
    fit: bool

    def __post_init__(self) -> None:
        if (channels := self.shape[0]) not in (1, 3):
            raise ValueError(f"need 1 or 3 channels, got {channels} (params.yaml: data.channels)")

    def __len__(self) -> int:
        return len(self.parts)

    def read(self, start: int, workers: int) -> Iterator[Decoded]:
        channels, resolution, _ = self.shape
        return decode_chunks(self._chunks(start), Decoding(channels, resolution, self.fit), workers)

    def _chunks(self, start: int) -> Iterator[list[Part]]:
        for first in range(start, len(self), _CHUNK):
            yield [self.parts[i] for i in range(first, min(first + _CHUNK, len(self)))]


def unreadable(where: str, reason: str, source: str) -> ValueError:
    """The error for an image that has none, naming it and the key that would skip it."""
    return ValueError(
        f"need sound images, got {where} in {source}: {reason}; repair it, or skip "
        "such images with on_error: skip (params.yaml: data.on_error)"
    )


def fingerprint(*facts: Iterable[object]) -> str:
    """sha256 of lists of names, sizes, times."""
    sha = hashlib.sha256()
    for fact in facts:
        for item in fact:
            sha.update(json.dumps(item).encode() + b"\n")
    return sha.hexdigest()
