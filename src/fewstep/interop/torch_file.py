"""Files of `torch.save`, in its zip format or the one before torch 1.6, without `torch.load`.

A zip archive contains a pickle, `data.pkl`, and each storage as a file `data/<key>`. The older
format is a sequence of pickles followed by the storages. Nothing is unpacked to the disk.
"""

import io
import mmap
import os
import re
import stat
import struct
import zipfile
from collections import Counter
from typing import Any, BinaryIO

from torch import Tensor

from fewstep.interop.opcodes import PERSISTENT_ID, Inert, Reader, Rule, require
from fewstep.interop.tensors import CALLS, REBUILD, STORAGES, as_storage, storage_id

LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# zipfile raises all of these for damaged archives
_ERRORS = (ValueError, OSError, EOFError, KeyError, RuntimeError, struct.error, zipfile.BadZipFile)
_CALLS: dict[str, Rule | None] = {**CALLS, **dict.fromkeys(STORAGES)}


def read_torch_file(path: str | os.PathLike[str]) -> object:
    """The object in a file of `torch.save`: dicts, lists, numbers, tensors, and inert objects.

    Raises:
        ValueError: the file is truncated or damaged, is TorchScript, claims more than it holds, has
            members that torch never writes, or names something that weights do not need.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
                return _read_zip(file, size)
            # A file's read(n) allocates n bytes first, and n may be a false claim of terabytes;
            # a mapping only returns what is there.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                return read_legacy(stream, size, _CALLS)
        except _ERRORS as error:
            raise ValueError(f"refused {path}: {error or type(error).__name__}") from error


# --- the zip format --------------------------------------------------------------------------


def _read_zip(file: BinaryIO, size: int) -> object:
    with zipfile.ZipFile(file) as archive:
        members = _members(archive.infolist(), size)
        if "constants.pkl" in members:
            raise ValueError("it is TorchScript, a program; need only the weights (torch.save)")
        if "data.pkl" not in members:
            raise ValueError("need an archive of torch.save, got a zip without data.pkl")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("need little-endian tensors, got another byteorder")
        storages: dict[str, Tensor] = {}

        def storage(reader: Reader, *pid: object) -> Tensor:
            key, dtype, count = storage_id(pid)
            info = members.get(f"data/{key}")
            held = info.file_size if info else 0
            if info is None or held != count * dtype.itemsize:
                claim = f"{count * dtype.itemsize:.4g} bytes, {held} are there"
                raise ValueError(f"a tensor claims {claim} (data/{key[:80]})")
            if key not in storages:
                storages[key] = as_storage(archive.read(info), dtype)
            return storages[key].view(dtype)

        pickle = archive.read(members["data.pkl"])
        rules = _CALLS | {PERSISTENT_ID: storage}
        return Reader(io.BytesIO(pickle), len(pickle), rules).read()


def _members(infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by their names below its one root folder."""
    names = [info.orig_filename for info in infos]  # `filename` is already cut at a NUL
    for info in infos:
        if problem := _problem(info):
            raise ValueError(f"its member {info.orig_filename[:200]!r} {problem}")
    twice, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise ValueError(f"its member {twice[:200]!r} is there twice")
    # Members can overlap: thousands of them on the same bytes are a zip bomb without compression.
    if (total := sum(info.file_size for info in infos)) > size:
        raise ValueError(f"its members claim {total:.4g} bytes in a file of {size}")
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1:
        raise ValueError(f"need an archive of torch.save with one root folder, got {len(roots)}")
    return {name.partition("/")[2]: info for name, info in zip(names, infos, strict=True)}


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why `torch.save` cannot have written a member, or None."""
    name = info.orig_filename
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\x00-\x1f]", name):
        return "has an unsafe name"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return "is compressed, which torch never does"
    return None


# --- the format before torch 1.6 -------------------------------------------------------------


def read_legacy(stream: io.BytesIO | mmap.mmap, size: int, calls: dict[str, Rule | None]) -> Any:  # noqa: ANN401
    """The object in a `torch.save` file of the format before torch 1.6, of `size` bytes.

    Five pickles come first: a magic number, a version, a system, the object (whose persistent ids
    describe the storages) and the storages' keys. Each storage follows, as its length and bytes.
    So the object is read twice: once to learn the storages, and again when they have been read.

    Raises:
        ValueError: as `read_torch_file`.
    """
    described: dict[str, tuple[Any, int]] = {}

    def describe(reader: Reader, *pid: object) -> Inert:
        key, dtype, count = storage_id(pid)
        if described.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"the storage {key[:80]!r} is described in two ways")
        return Inert("storage", ())

    def storage(reader: Reader, *pid: object) -> Tensor:
        return storages[storage_id(pid)[0]]

    survey = Reader(stream, size, calls | dict.fromkeys(REBUILD) | {PERSISTENT_ID: describe})
    magic, version, system = (survey.read() for _ in range(3))
    if (magic, version, require(system, dict).get("little_endian")) != (_MAGIC_NUMBER, 1001, True):
        raise ValueError("need little-endian tensors in torch's format of 2016, version 1001")
    start = stream.tell()
    survey.read()
    keys = require(survey.read(), list)
    if len(keys) != len(described) or {require(key, str) for key in keys} != set(described):
        raise ValueError("its storages do not match its tensors")
    storages = {key: _read_storage(stream, size, *described[key]) for key in keys}
    if (end := stream.tell()) != size:
        raise ValueError(f"{size - end} bytes follow its last storage")
    stream.seek(start)
    return Reader(stream, size, calls | {PERSISTENT_ID: storage}).read()


def _read_storage(stream: io.BytesIO | mmap.mmap, size: int, dtype: Any, count: int) -> Tensor:  # noqa: ANN401
    stated = stream.read(8)
    length, left = count * dtype.itemsize, size - stream.tell()
    if not 0 <= length <= left or stated != count.to_bytes(8, "little"):
        raise ValueError(f"a tensor claims {length:.4g} bytes, {left} are there")
    return as_storage(stream.read(length), dtype)
