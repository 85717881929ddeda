"""Image files in a folder: EDM's, with dataset.json, or one folder a class."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.data.decode import MAX_BYTES
from fewstep.data.labels import folder_labels, is_image, listed_labels
from fewstep.data.stream import FileStream, fingerprint


@dataclass(frozen=True)
class FilePart:
    root: str
    where: str
    label: int

    def read(self) -> bytes:
        with open(os.path.join(self.root, self.where), "rb") as file:
            return file.read(MAX_BYTES)


@dataclass(frozen=True)
class _FolderParts:
    root: str
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> FilePart:
        return FilePart(self.root, self.names[index], int(self.labels[index]))


def open_folder(path: Path, resolution: int, channels: int, classes: int) -> FileStream:
    """Image files anywhere below `path`, sorted.

    With a dataset.json they are as EDM's tool left them, and must have the size of the params.
    Else they lie in class folders, have any size, and are cropped and resized.

    Raises:
        ValueError: no images, or labels that do not fit.
    """
    stats = dict(sorted(_walk(path)))
    names, json_file = list(stats), path / "dataset.json"
    if prepared := json_file.is_file():
        labels = listed_labels(json_file.read_bytes(), names, classes, str(path))
    else:
        names, labels = folder_labels(names, classes, str(path))
    shape = (channels, resolution, resolution)
    facts = fingerprint(([name, *stats[name]] for name in names), labels.tolist(), shape)
    parts = _FolderParts(str(path), names, labels)
    return FileStream(path.name, shape, classes, facts, "", parts, fit=not prepared)


def _walk(root: Path) -> list[tuple[str, tuple[int, int]]]:
    """Size and time of change of each image below `root`, by its path with `/`."""
    found = []
    for folder, _, files in os.walk(root):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in filter(is_image, (prefix + file for file in files)):
            status = os.stat(os.path.join(root, name))
            found.append((name, (status.st_size, status.st_mtime_ns)))
    if not found:
        raise ValueError(
            f"need PNG, JPEG or WebP images below {root}, got none (params.yaml: data.source)"
        )
    return found
