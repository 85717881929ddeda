"""Images in one LMDB, with the keys of the public DMD2 LMDBs.

images_{i}_data    raw uint8 CHW bytes
labels_{i}_data    int64, little-endian
images_shape       "N C H W"
labels_shape       "N"; theirs also "N 1"
fewstep_metadata   ours: JSON with shape, classes, source, sha256 of the content, and the names of
                   the classes if they have any
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from fewstep.budgets import HEADER, IMAGE, read_json, within
from fewstep.data.labelled import Source, check_labels, check_shape, classes_in
from fewstep.data.pages import check_pages
from fewstep.files import atomic_path
from fewstep.progress import progress
from fewstep.quoting import quoted

METADATA = b"fewstep_metadata"
_COMMIT = 64 << 20  # bytes between commits while building: bounds the memory of dirty pages


def build_lmdb(
    source: Source,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    silent: bool = False,
) -> dict:
    """Write `source` into one LMDB file, atomically, with the same bytes on every build.

    Keys are written in sorted order, so LMDB appends and fills its pages. The bytes depend on the
    machine's memory page size (4 KiB, or 16 KiB on Apple Silicon); `content_sha256` does not.

    Args:
        source: labelled images; each is read once, in the order of their keys.
        path: the file to write; an existing one is replaced.
        class_names: of the classes, instead of the source's own.
        silent: show no progress.

    Returns:
        The metadata stored in the file.

    Raises:
        ValueError: the source has no images, an image of another shape or type, or a label
            outside [0, source.classes).
        OSError: the disk is full.
    """
    count, shape = len(source), tuple(source.shape)
    if count == 0:
        raise _no_images(count, source.name)
    order = sorted(range(count), key=_image_key)
    digests = np.empty((count, 32), np.uint8)
    labels = np.empty(count, np.int64)
    metadata = {
        "format": 1,
        "images": count,
        "shape": list(shape),
        "classes": source.classes,
        "source": source.name,
    }
    if names := class_names or source.class_names:
        metadata["class_names"] = list(names)
    with atomic_path(path) as temporary, _Writer(temporary, _map_size(count, shape)) as writer:
        for i in progress(order, "build-lmdb", "images", silent=silent):
            image, label = source[i]
            labels[i] = label if source.classes else 0
            if image.dtype != np.uint8 or image.shape != shape:
                raise ValueError(
                    f"need uint8 images of {shape}, got {image.dtype} {image.shape} at index {i} "
                    f"in {source.name} (params.yaml: data.source)"
                )
            raw = image.tobytes()
            digests[i] = _digest(raw, int(labels[i]))
            writer.put(_image_key(i), raw)
        check_labels(labels, source.classes, source.name)
        # the sorted order: images_<digit>..., images_shape, labels_<digit>..., labels_shape
        writer.put(b"images_shape", " ".join(map(str, (count, *shape))).encode())
        for i in order:
            writer.put(_label_key(i), int(labels[i]).to_bytes(8, "little", signed=True))
        writer.put(b"labels_shape", str(count).encode())
        metadata["content_sha256"] = _content_sha256(digests, shape)
        # It sorts before all other keys but holds their hash, so it cannot be appended.
        writer.put(METADATA, json.dumps(metadata).encode(), append=False)
    return metadata


class ImageDataset:
    """A readable LMDB of images, ours or a public one (a file, or a folder with data.mdb).

    Opening it checks that the file is complete, that LMDB can follow all its pages, that it is in
    this layout, and that its first and last images are as long as `images_shape` says. It reads no
    other pixels: `verify` does, and so `fewstep preflight`. It can be pickled, and used after a
    fork.

    Args:
        path: the LMDB.
        classes: the number of classes in a public LMDB, which does not record it; None takes the
            largest label + 1. Ours record it, and ignore this argument.

    Raises:
        ValueError: missing, truncated, mislabelled, in another layout, or not an LMDB.
    """

    def __init__(self, path: str | os.PathLike[str], classes: int | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._env: lmdb.Environment | None = None
        with self._begin() as txn:
            self._count, self.shape = self._read_shape(txn)
            self.metadata: dict[str, Any] | None = self._read_metadata(txn)
        self.read([0, self._count - 1])
        known = self.metadata["classes"] if self.metadata else classes
        self.classes: int = classes_in(self.labels()) if known is None else known

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each class, or none."""
        names = (self.metadata or {}).get("class_names", ())
        return tuple(map(str, names)) if len(names) == self.classes else ()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        images, labels = self.read([index])
        return images[0], int(labels[0])

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 (B, C, H, W), and labels, int64 (B,), at `indices`, in that order.

        Raises:
            ValueError: an entry is missing, or its length contradicts images_shape.
        """
        images = np.empty((len(indices), int(np.prod(self.shape))), np.uint8)
        labels = np.empty(len(indices), np.int64)
        with self._begin() as txn:
            for row, i in enumerate(indices):
                images[row] = self._value(txn, _image_key(i), np.uint8, images.shape[1])
                labels[row] = self._value(txn, _label_key(i), np.int64, 1)[0]
        return images.reshape(-1, *self.shape), labels

    def labels(self) -> np.ndarray:
        """All labels, int64 (N,)."""
        with self._begin() as txn:
            rows = (self._value(txn, _label_key(i), np.int64, 1) for i in range(len(self)))
            return np.fromiter((row[0] for row in rows), np.int64, len(self))

    def content_sha256(self) -> str:
        """sha256 of images and labels, independent of the file's layout; see `_content_sha256`.

        Ours record it; a public LMDB has to be read in full (minutes for ImageNet).
        """
        return self.metadata["content_sha256"] if self.metadata else self._hash()

    def verify(self) -> None:
        """Read every image and compare with the sha256 in the metadata.

        Raises:
            ValueError: the content differs, or there are no metadata.
        """
        expected = self.metadata["content_sha256"] if self.metadata else "no fewstep_metadata"
        if (got := self._hash()) != expected:
            raise ValueError(f"need content with sha256 {expected}, got {got} in {self.path}")

    def check(self, resolution: int, channels: int, classes: int) -> None:
        """Refuse another resolution or number of channels or classes than the params'."""
        check_shape(self.shape, (channels, resolution, resolution), self.path)
        if self.metadata and self.classes != classes:
            raise ValueError(
                f"need {classes} classes, got {self.classes} in {self.path} "
                "(params.yaml: data.classes)"
            )
        if not self.metadata:  # ours were checked when they were built
            check_labels(self.labels(), classes, self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_env": None}

    def _begin(self) -> lmdb.Transaction:
        if self._env is None:
            self._env = _open(self.path)
        return self._env.begin(buffers=True)

    def _read_shape(self, txn: lmdb.Transaction) -> tuple[int, tuple[int, int, int]]:
        sizes = {}
        for key in ("images_shape", "labels_shape"):
            value = self._get(txn, key.encode())
            if value is None:
                raise _foreign(self.path, f"no key {key}")
            try:
                sizes[key] = tuple(int(word) for word in bytes(value[:200]).split())
            except ValueError:
                raise _foreign(self.path, f"{key} {quoted(bytes(value[:80]), 40)}") from None
        images, labels = sizes["images_shape"], sizes["labels_shape"]
        if len(images) != 4 or min(images[1:]) < 1:
            raise _foreign(self.path, f"images_shape {images}, not N C H W")
        count = images[0]
        if count < 1:
            raise _no_images(count, self.path)
        try:
            within(math.prod(images[1:]), IMAGE, "bytes of an image")
        except ValueError as error:
            raise _foreign(self.path, f"images_shape that claims more: {error}") from None
        if labels not in ((count,), (count, 1)):
            raise ValueError(
                f"need labels_shape {count}, one label per image, got "
                f"{' '.join(map(str, labels))} in {self.path} (params.yaml: data.source)"
            )
        entries = txn.stat()["entries"]
        if entries < 2 * count + 2:
            raise ValueError(
                f"need {2 * count + 2} entries for the {count} images of images_shape, got "
                f"{entries} in {self.path}: its build was interrupted (params.yaml: data.source)"
            )
        return count, images[1:]

    def _read_metadata(self, txn: lmdb.Transaction) -> dict[str, Any] | None:
        value = self._get(txn, METADATA)
        if value is None:
            return None
        try:
            within(len(value), HEADER, "bytes of fewstep_metadata")
            metadata = read_json(bytes(value), HEADER, "fewstep_metadata")
            stated = (metadata["images"], tuple(metadata["shape"]))
            _ = metadata["classes"] + 0, metadata["content_sha256"] + ""  # TypeError if neither
        except (ValueError, KeyError, TypeError):
            raise _foreign(self.path, f"fewstep_metadata {quoted(bytes(value[:81]))}") from None
        if stated != (self._count, self.shape):
            raise ValueError(
                f"need metadata that agree with images_shape {self._count} {self.shape}, got "
                f"{quoted(repr(stated)[:200])} in {self.path} (params.yaml: data.source)"
            )
        return metadata

    def _get(self, txn: lmdb.Transaction, key: bytes) -> bytes | memoryview | None:
        try:
            return txn.get(key)
        except lmdb.Error as error:
            raise ValueError(
                f"need an intact LMDB, got {error} at {key.decode()} in {self.path}; build it "
                "again (params.yaml: data.source)"
            ) from error

    def _value(self, txn: lmdb.Transaction, key: bytes, dtype: type, size: int) -> np.ndarray:
        value = self._get(txn, key)
        need = size * np.dtype(dtype).itemsize
        if value is None or len(value) != need:
            got = "no such key" if value is None else f"{len(value)} bytes"
            raise ValueError(
                f"need {need} bytes at {key.decode()}, got {got} in {self.path} "
                "(params.yaml: data.source)"
            )
        return np.frombuffer(value, np.dtype(dtype).newbyteorder("<"))

    def _hash(self) -> str:
        digests = np.empty((len(self), 32), np.uint8)
        for i in progress(range(len(self)), f"hash {self.name}", "images"):
            image, label = self[i]
            digests[i] = _digest(image.tobytes(), label)
        return _content_sha256(digests, self.shape)


class _Writer:
    """A new LMDB file, committed every `_COMMIT` bytes; the caller flushes it to the disk."""

    def __init__(self, path: Path, map_size: int) -> None:
        # meminit stays on: without it, stale memory would leak into the bytes of the file.
        # sync is off: one fsync at the end, in atomic_path, replaces one per commit.
        self._env = lmdb.open(
            str(path), subdir=False, lock=False, sync=False, map_size=map_size, readahead=False
        )
        self._txn = self._env.begin(write=True)
        self._pending, self._path, self._map_size = 0, path, map_size

    def put(self, key: bytes, value: bytes, *, append: bool = True) -> None:
        """Add a key; with `append`, one that sorts after all others."""
        try:
            added = self._txn.put(key, value, overwrite=False, append=append)
        except lmdb.MapFullError as error:
            raise ValueError(
                f"need images that fit into {self._map_size} bytes, got more at {key.decode()} "
                f"while building {self._path.name} (params.yaml: data.source)"
            ) from error
        assert added, f"{key!r} does not sort after the keys before it"
        self._pending += len(value)
        if self._pending >= _COMMIT:
            self._pending = 0
            self._txn.commit()
            self._txn = self._env.begin(write=True)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._txn.commit()
            else:
                self._txn.abort()
        finally:
            self._env.close()


def _image_key(i: int) -> bytes:
    return b"images_%d_data" % i


def _label_key(i: int) -> bytes:
    return b"labels_%d_data" % i


def _digest(raw: bytes, label: int) -> np.ndarray:
    sha = hashlib.sha256(label.to_bytes(8, "little", signed=True) + raw)
    return np.frombuffer(sha.digest(), np.uint8)


def _content_sha256(digests: np.ndarray, shape: Sequence[int]) -> str:
    """sha256 of "N C H W\\n" followed by each image's sha256(label as int64 LE + CHW bytes).

    A hash of hashes, because images are written in the order of their keys (0, 1, 10, 100, ...).
    """
    header = " ".join(map(str, (len(digests), *shape))) + "\n"
    return hashlib.sha256(header.encode() + digests.tobytes()).hexdigest()


def _map_size(count: int, shape: Sequence[int]) -> int:
    """An upper bound on the file's size. It only reserves address space, not disk or memory."""
    pages = -(-int(np.prod(shape)) // mmap.PAGESIZE) + 2
    return (count + 64) * pages * mmap.PAGESIZE


# One environment per file: LMDB forbids a second one in a process and its forked children. Sharing
# is safe, even across a fork, because nothing locks: readers only look at a read-only mapping.
_open_environments: WeakValueDictionary[tuple[int, int], lmdb.Environment] = WeakValueDictionary()


def _open(path: Path) -> lmdb.Environment:
    """Open an LMDB file, or a folder with data.mdb, for reading, if it is complete."""
    file = path / "data.mdb" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"need an LMDB, got nothing at {file} (params.yaml: data.source)")
    status = file.stat()
    key = (status.st_dev, status.st_ino)
    if (env := _open_environments.get(key)) is not None:
        return env
    check_pages(file)
    try:
        # Training reads in random order, so reading ahead would fetch pages that nobody wants.
        env = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(
            f"need an LMDB, got {file} of {status.st_size} bytes: {error}; truncated or another "
            "kind of file (params.yaml: data.source)"
        ) from error
    _open_environments[key] = env
    return env


def _no_images(count: int, where: str | Path) -> ValueError:
    return ValueError(f"need at least 1 image, got {count} in {where} (params.yaml: data.source)")


def _foreign(path: Path, what: str) -> ValueError:
    return ValueError(
        f"need an LMDB with images_shape, labels_shape, images_0_data, ..., got {what} in {path} "
        "(params.yaml: data.source)"
    )
