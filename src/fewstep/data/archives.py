"""Image files in a zip: EDM's, with dataset.json, or one folder a class. Nothing is unpacked."""

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fewstep.data.decode import MAX_BYTES
from fewstep.data.labels import folder_labels, is_image, listed_labels
from fewstep.data.stream import FileStream, fingerprint

_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, ..., lengths of name and extra field
_FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")


@dataclass(frozen=True)
class ZipPart:
    """A member of a zip, read without the zip's directory, which is large."""

    archive: str
    where: str
    label: int
    offset: int
    stored: int
    size: int
    crc: int
    method: int

    def read(self) -> bytes:
        file = _descriptor(self.archive)
        head = os.pread(file, _HEADER.size, self.offset)
        if len(head) < _HEADER.size or head[:4] != b"PK\x03\x04":
            raise ValueError("the zip is damaged here")
        _, name, extra = _HEADER.unpack(head)
        if max(self.stored, self.size) > MAX_BYTES:
            raise ValueError(f"claims {max(self.stored, self.size)} bytes")
        data = os.pread(file, self.stored, self.offset + _HEADER.size + name + extra)
        if self.method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, self.size)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise ValueError("its bytes are not those that the zip promises (CRC-32)")
        return data


@lru_cache(maxsize=4)
def _descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def _inflate(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"its compression is damaged: {error}") from error


@dataclass(frozen=True)
class _ZipParts:
    archive: str
    names: list[str]
    labels: np.ndarray
    table: np.ndarray  # (N, 5) int64: the first five of _FIELDS

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> ZipPart:
        return ZipPart(
            self.archive, self.names[index], int(self.labels[index]), *self.table[index].tolist()
        )


def open_zip(path: Path, resolution: int, channels: int, classes: int) -> FileStream:
    """The image files of a zip, sorted.

    With a dataset.json they are as EDM's tool left them, and must have the size of the params.
    Else they lie in class folders, have any size, and are cropped and resized.

    Raises:
        ValueError: no whole zip, no images, encrypted or oddly compressed ones, or labels that do
            not fit.
    """
    names, table, listing = _directory(path)
    if listing is not None:
        labels = listed_labels(listing, names, classes, path.name)
    else:
        row = {name: i for i, name in enumerate(names)}
        names, labels = folder_labels(names, classes, path.name)
        table = table[[row[name] for name in names]]
    shape = (channels, resolution, resolution)
    status = path.stat()
    facts = ([path.name, status.st_size, status.st_mtime_ns], names, labels.tolist(), shape)
    parts = _ZipParts(str(path), names, labels, table)
    return FileStream(
        path.name, shape, classes, fingerprint(*facts), "", parts, fit=listing is None
    )


def _directory(path: Path) -> tuple[list[str], np.ndarray, bytes | None]:
    """Names and places of the images, and dataset.json."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(
                (info for info in archive.infolist() if is_image(info.filename)),
                key=lambda info: info.filename,
            )
            listing = next((n for n in archive.namelist() if n == "dataset.json"), None)
            text = None if listing is None else archive.read(listing)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"need a whole zip, got {path}: {error} (params.yaml: data.source)"
        ) from error
    names = [info.filename for info in infos]
    table = np.array([[getattr(i, f) for f in _FIELDS] for i in infos], np.int64).reshape(-1, 6)
    odd = ~np.isin(table[:, 4], (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)) | (table[:, 5] & 1 == 1)
    if odd.any() or not names or len(set(names)) < len(names):
        got = f"{names[int(odd.argmax())]} that is not" if odd.any() else "no image or one twice"
        raise ValueError(
            f"need PNG, JPEG or WebP images, stored or deflated, in {path}, got {got} "
            "(params.yaml: data.source)"
        )
    return names, table[:, :5], text
