"""Arrays as .npz files whose bytes depend on the arrays alone.

numpy.savez makes zipfile write ZIP64 headers, whose bytes differ between patch releases of Python.
The same arrays would then have another sha256 on another machine, and so would everything that
depends on them.
"""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fewstep.budgets import (
    ARRAYS,
    NPY_HEADER,
    PACKED,
    ZIP_DIRECTORY,
    Bounded,
    number,
    regular,
    within,
)
from fewstep.files import atomic_path
from fewstep.quoting import plain, quoted

VERSION = 45  # of the zip format: the first that allows files above 4 GiB
# What zipfile and numpy raise for damaged files. Of these KeyError, RuntimeError (encryption),
# OverflowError (offsets beyond 2^63) and MemoryError (claims of terabytes) would be tracebacks.
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError),
    *(struct.error, zipfile.BadZipFile, zlib.error, SyntaxError, UnicodeError),
)
_CHUNK = 1 << 24  # bytes of one read
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array in an open .npz: what its header says; the numbers are not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int
    archive: zipfile.ZipFile

    @property
    def real(self) -> bool:
        return self.dtype.kind == "f"

    def read(self) -> NDArray[np.generic]:
        """The array.

        Raises:
            ValueError: damaged, or fewer numbers than it claims.
        """
        with damage(self.archive.filename or ""):
            return self._read()

    def _read(self) -> NDArray[np.generic]:
        flat = np.empty(math.prod(self.shape), self.dtype)
        view, done = memoryview(cast(Any, flat.view(np.uint8))), 0
        with self.archive.open(f"{self.name}.npy") as file:
            file.read(self.start)
            while done < len(view) and (
                got := cast(Any, file).readinto(view[done : done + _CHUNK])
            ):
                done += got
            file.read(1)  # at its end the CRC-32 is compared
        if done < len(view):
            raise ValueError(f"{self.name} has {done} bytes of {len(view)}")
        if self.fortran:
            return flat.reshape(self.shape[::-1]).transpose()
        return flat.reshape(self.shape)


@contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Generator[dict[str, StoredArray]]:
    """The arrays of an .npz by name, none of which is read: `numpy.load` believes their headers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npz, one with Python objects or more than one array of a name, arrays that
            claim more than they hold, or a budget passed.
    """
    with damage(path), open(regular(path), "rb") as file:
        with zipfile.ZipFile(Bounded(file, ZIP_DIRECTORY, "a zip's directory")) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            found = {info.filename: info for info in infos}
            if len(found) < len(infos):
                raise ValueError("two arrays have one name")
            arrays = [_stored(archive, info) for info in infos]
            within(sum(info.file_size for info in infos), ARRAYS, "bytes of arrays")
            yield {array.name: array for array in arrays}


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    name = info.filename.removesuffix(".npy")
    floor, ratio = PACKED
    if info.file_size > max(floor, ratio * info.compress_size):
        raise ValueError(
            f"{quoted(name)} unpacks from {info.compress_size} to {info.file_size} bytes: more "
            f"than {ratio} times"
        )
    with archive.open(info) as file:
        header = Bounded(cast(Any, file), NPY_HEADER, "an array's header")
        if (read := _HEADERS.get(npy.read_magic(cast(Any, header)))) is None:
            raise ValueError(f"{quoted(name)} has an .npy header of another version")
        try:
            shape, fortran, dtype = read(cast(Any, header))
        except Exception as error:  # numpy parses it as Python, and raises what the parser raises
            raise ValueError(f"{quoted(name)} has no .npy header: {plain(str(error))}") from error
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{quoted(name)} has Python objects, which only allow_pickle would read")
    if min((*shape, 0)) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - start:
        claim = number(math.prod(shape) * dtype.itemsize)
        raise ValueError(f"{quoted(name)} claims {claim} bytes, {info.file_size - start} are there")
    return StoredArray(name, shape, dtype, fortran, start, archive)


@contextmanager
def damage(path: str | os.PathLike[str]) -> Generator[None]:
    """Turn whatever a damaged zip raises into a ValueError.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is wrong.
    """
    try:
        yield
    except (ValueError, FileNotFoundError):
        raise
    except DAMAGE as error:
        what = str(error) or type(error).__name__
        raise ValueError(f"{what} ({Path(path).name})") from error


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write a file for `numpy.load`, atomically: uncompressed, in the given order.

    Raises:
        ValueError: an array of objects.
        OSError: the disk is full.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in arrays.items():
            array = np.asanyarray(values)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: no clock
            entry.create_version = entry.extract_version = VERSION
            entry.file_size = array.nbytes + 1024  # zipfile decides by it whether to use ZIP64
            with archive.open(entry, "w") as file:
                npy.write_array(file, array, allow_pickle=False)
