"""Image files in a zip: with EDM's dataset.json, or one folder per class. Nothing is unpacked."""

import os
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fewstep.arrays import DAMAGE
from fewstep.budgets import LISTING, ZIP_DIRECTORY, Bounded, within
from fewstep.data.decode import MAX_BYTES
from fewstep.data.labelled import classes_in
from fewstep.data.labels import folder_labels, is_image, listed_labels, other_pictures
from fewstep.data.stream import FileStream, fingerprint, state_of
from fewstep.quoting import plain, printable

_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, ..., lengths of name and extra field
_FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")


@dataclass(frozen=True)
class ZipPart:
    """A member of a zip, with all that is needed to read it.

    A worker that opened the archive with zipfile would parse its directory: for a million images,
    several seconds and half a gigabyte in each process.
    """

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
            try:  # one byte more than promised is enough to notice a zip bomb
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
            except zlib.error as error:
                raise ValueError(f"its compressed data is damaged: {error}") from error
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise ValueError("its bytes do not match the zip's directory (CRC-32)")
        return data


@lru_cache(maxsize=4)
def _descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def open_zip(path: Path, shape: tuple[int, int, int], classes: int | None) -> FileStream:
    """The image files of a zip, sorted; otherwise as `open_folder`.

    Raises:
        ValueError: a damaged zip, no images, encrypted or unusually compressed ones, or labels
            that do not fit.
    """
    named: tuple[str, ...] = ()
    names, table, listing, note = _directory(path)
    if listing is not None:
        labels = listed_labels(listing, names, classes, path.name)
    else:
        row = {name: i for i, name in enumerate(names)}
        names, labels, named = folder_labels(names, classes, path.name)
        table = table[[row[name] for name in names]]
    facts = fingerprint(state_of(path), names, labels.tolist(), shape)

    def part(i: int) -> ZipPart:
        return ZipPart(str(path), names[i], int(labels[i]), *table[i].tolist())

    fit = listing is None
    count = classes_in(labels) if classes is None else classes
    about = path.name, shape, labels, count, facts, note
    return FileStream(*about, part, fit, class_names=named)


def _directory(path: Path) -> tuple[list[str], np.ndarray, bytes | None, str]:
    """Names of the images, the first five _FIELDS of each, dataset.json, and a note."""
    try:
        with (
            open(path, "rb") as file,
            zipfile.ZipFile(Bounded(file, ZIP_DIRECTORY, "a zip's directory")) as archive,
        ):
            link = next(filter(_is_link, archive.infolist()), None)
            note = other_pictures(archive.namelist())
            infos = sorted(
                (info for info in archive.infolist() if is_image(info.filename)),
                key=lambda info: info.filename,
            )
            has_listing = "dataset.json" in archive.namelist()
            listing = _listing(archive, len(infos)) if has_listing else None
    except DAMAGE as error:
        raise ValueError(
            f"need an intact zip, got {path}: {printable(str(error), keep='')} "
            "(params.yaml: data.source)"
        ) from error
    if link is not None:
        raise ValueError(
            f"need files in the zip {path}, got the link {link.filename!r}; zip without -y "
            "(params.yaml: data.source)"
        )
    names = [info.filename for info in infos]
    size = path.stat().st_size
    if beyond := next((info for info in infos if info.header_offset >= size), None):
        raise ValueError(
            f"need an intact zip, got {path} of {size} bytes, with {plain(beyond.filename)} "
            "behind its end (params.yaml: data.source)"
        )
    if large := next((i for i in infos if max(i.file_size, i.compress_size) >= 1 << 62), None):
        raise ValueError(
            f"need an intact zip, got {path}, in which {plain(large.filename)} claims exabytes "
            "(params.yaml: data.source)"
        )
    # 48 bytes per image in an array; zipfile's objects take ten times as much.
    table = np.array([[getattr(i, f) for f in _FIELDS] for i in infos], np.int64).reshape(-1, 6)
    odd = ~np.isin(table[:, 4], (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)) | (table[:, 5] & 1 == 1)
    if odd.any() or not names or len(set(names)) < len(names):
        first = plain(names[int(odd.argmax())], 200) if odd.any() else ""
        got = f"{first} that is not" if first else "no image or one twice"
        raise ValueError(
            f"need PNG, JPEG or WebP images, stored or deflated, in {path}, got {got} "
            "(params.yaml: data.source)"
        )
    return names, table[:, :5], listing, note


def _is_link(info: zipfile.ZipInfo) -> bool:
    """Whether a member is a symbolic link, which may stand for a folder of images."""
    return info.create_system == 3 and stat.S_ISLNK(info.external_attr >> 16)  # 3: Unix


def _listing(archive: zipfile.ZipFile, images: int) -> bytes:
    """dataset.json, if it has the length that so many images need."""
    info, (base, each) = archive.getinfo("dataset.json"), LISTING
    within(info.file_size, base + each * images, f"bytes of dataset.json for {images} images")
    return archive.read(info)
