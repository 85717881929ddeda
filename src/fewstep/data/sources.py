"""Where images come from: what `data.source` names, as a sequence of (uint8 CHW, label).

A new kind of source is one more branch of `open_source` that returns a `Source`. Those that must be
decoded first are a `Stream`, which `ingest` writes down before `build_lmdb` reads it.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fewstep.data.archives import open_zip
from fewstep.data.cifar import read_cifar
from fewstep.data.folders import open_folder
from fewstep.data.imagenet_npz import batches, open_batches
from fewstep.data.lmdb import ImageDataset, check_labels, check_shape
from fewstep.data.parquet import open_parquet, shards


class Source(Protocol):
    """Labelled images in a fixed order, each readable by its index."""

    @property
    def name(self) -> str:
        """What the LMDB's metadata call the source: no folders of this machine."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        ...

    @property
    def classes(self) -> int:
        """Every label is in [0, classes)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        """The image, uint8 (C, H, W), and its label."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory: uint8 (N, C, H, W) and int64 (N,)."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.images.shape
        return c, h, w

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


@dataclass(frozen=True)
class LmdbSource:
    """An LMDB that exists already, ours or a public one."""

    name: str
    dataset: ImageDataset
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.dataset.shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        images, labels = self.dataset.read([index])
        return images[0], int(labels[0])


def open_source(path: str | Path, resolution: int, channels: int, classes: int) -> Source:
    """Open what `data.source` names and check that it is what the params promise.

    Args:
        path: one of
            - an LMDB (file or folder) in the layout of `fewstep.data.lmdb`, DMD2's for one;
            - a `.npz` with `images` (N, C, H, W) uint8 and `labels` (N,) integers;
            - EDM's images, a `.zip` or folder with dataset.json;
            - a `.zip` or folder with a folder of PNG, JPEG or WebP images for each class;
            - downsampled ImageNet: train_data_batch_*.npz, one or a folder of them;
            - Hugging Face shards: `.parquet`, one or a folder of them;
            - CIFAR-10's `.tar.gz` of its binary version.
        resolution, channels, classes: what the images must have (params.yaml: data). Those of
            class folders and parquet shards are cropped and resized to it.

    Raises:
        ValueError: no such file, another kind of file, other shapes or types, no images, or a
            label outside [0, classes).
    """
    path = Path(path)
    wanted = (path, resolution, channels, classes)
    if not path.exists():
        raise ValueError(f"need a file or folder, got nothing at {path} (params.yaml: data.source)")
    if batches(path):
        return open_batches(*wanted)
    if path.suffix == ".npz":
        return _open_npz(*wanted)
    if path.name.endswith(".tar.gz"):
        return _open_cifar(*wanted)
    if path.suffix in (".lmdb", ".mdb") or (path / "data.mdb").is_file():
        dataset = ImageDataset(path, classes)
        dataset.check(resolution, channels, classes)
        return LmdbSource(path.name, dataset, classes)
    if path.suffix == ".zip":
        return open_zip(*wanted)
    if shards(path):
        return open_parquet(*wanted)
    if path.is_dir():
        return open_folder(*wanted)
    raise ValueError(
        "need an LMDB, a .npz, .zip, .parquet or .tar.gz, or a folder of images, "
        f"got {path} (params.yaml: data.source)"
    )


def _open_cifar(path: Path, resolution: int, channels: int, classes: int) -> ArraySource:
    images, labels = read_cifar(path)
    check_shape(images.shape[1:], resolution, channels, path)
    check_labels(labels, classes, path)
    return ArraySource(path.name, images, labels, classes)


def _open_npz(path: Path, resolution: int, channels: int, classes: int) -> ArraySource:
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file}
            names = file.files
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"need a whole .npz without pickles, got {path}: {error} (params.yaml: data.source)"
        ) from error
    if len(arrays) < 2:
        raise ValueError(
            f"need the arrays images and labels in {path}, got {names} (params.yaml: data.source)"
        )
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"need images of uint8 (N, C, H, W) in {path}, got {images.dtype} "
            f"{images.shape} (params.yaml: data.source)"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"need integer labels of shape ({len(images)},), one an image, in {path}, got "
            f"{labels.dtype} {labels.shape} (params.yaml: data.source)"
        )
    if len(images) == 0:
        raise ValueError(f"need at least 1 image, got 0 in {path} (params.yaml: data.source)")
    check_shape(images.shape[1:], resolution, channels, path)
    check_labels(labels, classes, path)
    return ArraySource(path.name, images, labels.astype(np.int64), classes)
