"""Files of `torch.save`, in its zip format or the one before torch 1.6, without `torch.load`.

A zip archive contains a pickle, `data.pkl`, and each storage as a file `data/<key>`. The older
format is a sequence of pickles followed by the storages. Nothing is unpacked to the disk.
"""

import mmap
import os
import re
import stat
import struct
import zipfile
from collections import Counter
from typing import Any, BinaryIO

from fewstep.budgets import PICKLE_TEXT, TORCH_DIRECTORY, Bounded, number, regular, within
from fewstep.interop.opcodes import PERSISTENT_ID, Reader, Rule, require
from fewstep.interop.stream import Span, Stream
from fewstep.interop.tensors import CALLS, STORAGES, Storage, storage_id
from fewstep.quoting import quoted

LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
TRAINING_STATE = "it is a training state; import the averaged network-snapshot-*.pkl beside it"
_OPTIMIZER = b"optimizer_state"  # a key of EpiGenomics' training states
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, ..., lengths of name and extra
# zipfile raises all of these for damaged archives
_ERRORS = (
    *(ValueError, OSError, EOFError, KeyError, RuntimeError, OverflowError),
    *(struct.error, zipfile.BadZipFile),
)
_CALLS: dict[str, Rule | None] = {**CALLS, **dict.fromkeys(STORAGES)}


def read_torch_file(path: str | os.PathLike[str]) -> object:
    """The object in a file of `torch.save`: dicts, lists, numbers, inert objects, `Stored` tensors.

    Raises:
        ValueError: the file is truncated or damaged, is TorchScript, claims more than it holds, has
            members that torch never writes, names something that weights do not need, or passes a
            budget.
    """
    with open(regular(path), "rb") as file:
        try:
            if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
                return _read_zip(file, str(path))
            return read_legacy(Stream(str(path), mapped(file)), _CALLS)
        except _ERRORS as error:
            raise ValueError(f"refused {path}: {error or type(error).__name__}") from error


def mapped(file: BinaryIO) -> mmap.mmap:
    """A file in memory, of which only what is looked at is read.

    A file's read(n) allocates n bytes first, and n may be a false claim of terabytes.
    """
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# --- the zip format --------------------------------------------------------------------------


def _read_zip(file: BinaryIO, path: str) -> object:
    size = os.fstat(file.fileno()).st_size
    directory = Bounded(file, TORCH_DIRECTORY, "a zip's directory")
    with zipfile.ZipFile(directory) as archive:
        members = _members(archive.infolist(), size)
        if "constants.pkl" in members:
            raise ValueError("it is TorchScript, a program; need only the weights (torch.save)")
        if "data.pkl" not in members:
            raise ValueError("need an archive of torch.save, got a zip without data.pkl")
        if "byteorder" in members and _small(archive, members["byteorder"], 16) != b"little":
            raise ValueError("need little-endian tensors, got another byteorder")
        pickle = _small(archive, members["data.pkl"], PICKLE_TEXT)
    storages: dict[str, Storage] = {}

    def storage(reader: Reader, *pid: object) -> Storage:
        key, dtype, count = storage_id(pid)
        info = members.get(f"data/{key}")
        held = info.file_size if info else 0
        if info is None or held != count * dtype.itemsize:
            claim = f"{number(count * dtype.itemsize)} bytes, {held} are there"
            raise ValueError(f"a tensor claims {claim} ({quoted(f'data/{key[:80]}')})")
        if key not in storages:
            storages[key] = Storage(dtype, count, _span(file, path, info))
        if storages[key].dtype != dtype:
            raise ValueError(f"the storage {quoted(key)} is described in two ways")
        return storages[key]

    try:
        return Reader(Stream(pickle, pickle), _CALLS | {PERSISTENT_ID: storage}).read()
    except ValueError as error:
        if _OPTIMIZER in pickle:  # beside which there are objects that weights do not need
            raise ValueError(f"{TRAINING_STATE} ({error})") from error
        raise


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    within(info.file_size, most, f"bytes of {quoted(info.filename)}")
    return archive.read(info)


def _span(file: BinaryIO, path: str, info: zipfile.ZipInfo) -> Span:
    """Where the bytes of a member are: behind its own header, which may be longer than needed."""
    head = os.pread(file.fileno(), _HEADER.size, info.header_offset)
    if len(head) < _HEADER.size or head[:4] != b"PK\x03\x04":
        raise ValueError(f"no member at byte {info.header_offset}, where the zip has one")
    _, name, extra = _HEADER.unpack(head)
    start = info.header_offset + _HEADER.size + name + extra
    return Span(path, start, info.file_size, info.CRC)


def _members(infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by their names below its one root folder."""
    names = [info.orig_filename for info in infos]  # `filename` is already cut at a NUL
    for info in infos:
        if problem := _problem(info):
            raise ValueError(f"its member {quoted(info.orig_filename, 200)} {problem}")
    twice, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise ValueError(f"its member {quoted(twice, 200)} is there twice")
    # Members can overlap: thousands of them on the same bytes are a zip bomb without compression.
    if (total := sum(info.file_size for info in infos)) > size:
        raise ValueError(f"its members claim {number(total)} bytes in a file of {size}")
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


def read_legacy(stream: Stream, calls: dict[str, Rule | None]) -> Any:  # noqa: ANN401
    """The object in a `torch.save` file of the format before torch 1.6.

    Five pickles come first: a magic number, a version, a system, the object (whose persistent ids
    describe the storages) and the storages' keys. Each storage follows, as its length and bytes.

    Raises:
        ValueError: as `read_torch_file`.
    """
    storages: dict[str, Storage] = {}

    def describe(reader: Reader, *pid: object) -> Storage:
        key, dtype, count = storage_id(pid)
        storage = storages.setdefault(key, Storage(dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"the storage {quoted(key)} is described in two ways")
        return storage

    reader = Reader(stream, calls | {PERSISTENT_ID: describe})
    magic, version, system = (reader.read() for _ in range(3))
    if (magic, version, require(system, dict).get("little_endian")) != (_MAGIC_NUMBER, 1001, True):
        raise ValueError("need little-endian tensors in torch's format of 2016, version 1001")
    content = reader.read()
    keys = require(reader.read(), list)
    if len(keys) != len(storages) or {require(key, str) for key in keys} != set(storages):
        raise ValueError("its storages do not match its tensors")
    for key in keys:
        storages[key].span = _next(stream, storages[key])
    if left := stream.end - stream.tell():
        raise ValueError(f"{left} bytes follow its last storage")
    return content


def _next(stream: Stream, storage: Storage) -> Span:
    """Where a storage's bytes are; the stream is left behind them."""
    stated, length = stream.read(8), storage.count * storage.dtype.itemsize
    left = stream.end - stream.tell()
    if not 0 <= length <= left or stated != storage.count.to_bytes(8, "little"):
        raise ValueError(f"a tensor claims {number(length)} bytes, {left} are there")
    return stream.span(length)
