"""Where images come from: what `data.source` names, as a sequence of (uint8 CHW, label).

To add a kind of source, add a branch to `open_source` that returns a `Source`. If its images have
to be decoded first, return a `Stream`: `ingest` stores it on the disk before `build_lmdb` reads it.
"""

from pathlib import Path

import numpy as np

from fewstep.arrays import StoredArray, open_arrays
from fewstep.budgets import regular
from fewstep.data.archives import open_zip
from fewstep.data.cifar import read_cifar
from fewstep.data.folders import open_folder
from fewstep.data.idx import is_idx, read_idx_folder
from fewstep.data.imagenet_npz import batches, open_batches
from fewstep.data.labelled import ArraySource, Source, check_labels, check_shape, classes_in
from fewstep.data.lmdb import ImageDataset
from fewstep.data.parquet import open_parquet, shards
from fewstep.quoting import listed, printable


def open_source(path: str | Path, resolution: int, channels: int, classes: int | None) -> Source:
    """Open what `data.source` names and check that it is what the params promise.

    Args:
        path: one of
            - an LMDB (file or folder) in the layout of `fewstep.data.lmdb`, such as DMD2's;
            - an `.npz` with `images` (N, C, H, W) uint8 and `labels` (N,) integers;
            - EDM's images, a `.zip` or folder with dataset.json;
            - a `.zip` or folder with a folder of PNG, JPEG or WebP images for each class;
            - downsampled ImageNet: train_data_batch_*.npz, one or a folder of them;
            - Hugging Face shards: `.parquet`, one or a folder of them;
            - CIFAR-10's binary version, `.tar.gz`;
            - a folder with the idx files of MNIST or one of its kin.
        resolution, channels, classes: of the images (params.yaml: data). Class folders and parquet
            shards are cropped and resized to the resolution, idx images get a black frame; all else
            must have it. With 0 classes labels may be anything and do not count; None takes as many
            as there are.

    Raises:
        ValueError: no such file, another kind of file, other shapes or types, no images, or a
            label outside [0, classes).
    """
    path, shape = Path(path), (channels, resolution, resolution)
    if not path.exists():
        raise ValueError(f"need a file or folder, got nothing at {path} (params.yaml: data.source)")
    if not path.is_dir():
        _check_regular(path)
    if batches(path):  # first, because one of them is an .npz, too
        return open_batches(path, shape, classes)
    if path.suffix in (".lmdb", ".mdb") or (path / "data.mdb").is_file():
        dataset = ImageDataset(path, classes)
        dataset.check(resolution, channels, classes or dataset.classes)
        if classes == 0:
            dataset.classes = 0
        return dataset
    if path.suffix == ".zip":
        return open_zip(path, shape, classes)
    if shards(path):
        return open_parquet(path, shape, classes)
    if path.is_dir() and not is_idx(path):
        return open_folder(path, shape, classes)
    if path.is_dir():
        images, labels = read_idx_folder(path, resolution)
    elif path.suffix == ".npz":
        images, labels = _read_npz(path, shape)
    elif path.name.endswith(".tar.gz"):
        images, labels = read_cifar(path)
    else:
        raise ValueError(
            "need an LMDB, a .npz, .zip, .parquet or .tar.gz, or a folder of images, "
            f"got {path} (params.yaml: data.source)"
        )
    check_shape(images.shape[1:], shape, path)
    classes = classes_in(labels) if classes is None else classes
    check_labels(labels, classes, path)
    return ArraySource(path.name, images, labels, classes)


def _check_regular(path: Path) -> None:
    try:
        regular(path)
    except ValueError as error:
        raise ValueError(f"{error} (params.yaml: data.source)") from None


def _read_npz(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, C, H, W), and labels, int64 (N,); read once their headers are right."""
    try:
        with open_arrays(path) as arrays:
            _check_headers(arrays, shape, path)
            images = arrays["images"].read()
            # data of one class need none
            labels = arrays["labels"].read() if "labels" in arrays else np.zeros(len(images))
    except (OSError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"need an intact .npz without pickles, got {path}: {printable(str(error), keep='')} "
            "(params.yaml: data.source)"
        ) from error
    return images.astype(np.uint8, copy=False), labels.astype(np.int64)


def _check_headers(arrays: dict[str, StoredArray], shape: tuple[int, int, int], path: Path) -> None:
    if "images" not in arrays:
        raise ValueError(
            f"need the array images, and labels beside it, in {path}, got "
            f"{listed(list(arrays)) or 'none'} (params.yaml: data.source)"
        )
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8 or len(images.shape) != 4:
        raise ValueError(
            f"need images of uint8 (N, C, H, W) in {path}, got {images.dtype} "
            f"{images.shape} (params.yaml: data.source)"
        )
    if labels and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise ValueError(
            f"need integer labels of shape ({images.shape[0]},), one per image, in {path}, got "
            f"{labels.dtype} {labels.shape} (params.yaml: data.source)"
        )
    if images.shape[0] == 0:
        raise ValueError(f"need at least 1 image, got 0 in {path} (params.yaml: data.source)")
    check_shape(images.shape[1:], shape, path)
