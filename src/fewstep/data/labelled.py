"""Labelled images in a fixed order: the interface of every source, and what it must satisfy."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Labelled images in a fixed order: an index gives an image, uint8 (C, H, W), and its label.

    Attributes:
        name: in the LMDB's metadata; without folders, so it is equal on every machine.
        shape: (C, H, W) of every image.
        classes: every label is in [0, classes); 0: labels are there but do not count.
        class_names: one for each class, or none.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def classes(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory: uint8 (N, C, H, W) and int64 (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: int
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.images.shape
        return c, h, w

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def classes_in(labels: np.ndarray) -> int:
    """How many classes labels (N,) speak of: the largest + 1."""
    return int(labels.max(initial=0)) + 1


def check_shape(
    shape: Sequence[int], wanted: tuple[int, int, int], path: str | os.PathLike[str]
) -> None:
    """Refuse images that are not (C, H, W) = `wanted`, naming the key to edit."""
    if tuple(shape) == wanted:
        return
    key = "data.channels" if shape[0] != wanted[0] else "data.resolution"
    need, got = "x".join(map(str, wanted)), "x".join(map(str, shape))
    raise ValueError(f"need images of {need} (CxHxW), got {got} in {path} (params.yaml: {key})")


def check_labels(labels: np.ndarray, classes: int, path: str | os.PathLike[str]) -> None:
    """Refuse labels (N,) outside [0, classes), naming the first one and its index.

    Data without classes may have any labels: they are not looked at.
    """
    outside = (labels < 0) | (labels >= classes) if classes else np.zeros(1, bool)
    if outside.any():
        first = int(outside.argmax())
        raise ValueError(
            f"need labels in [0, {classes}), got {labels[first]} at index {first} in {path} "
            "(params.yaml: data.classes)"
        )
