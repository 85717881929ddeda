"""What reading a file from others may cost at most, in bytes, objects and seconds.

A file of a few bytes can ask for terabytes or for ever: it claims sizes, repeats what it holds,
unpacks to a thousand times its length, or is a pipe that never ends. Every reader of foreign files
takes its limits from here. They are several times what real files need, and small enough that a
refusal takes seconds and less than a gigabyte.
"""

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MIB = 1 << 20

# Pickles. EDM's ImageNet-64 teacher takes 80,000 opcodes and 0.2 MiB of text.
PICKLE_OPCODES = 600_000
PICKLE_TEXT = 16 * MIB  # names, sources and all else but the numbers of tensors
PICKLE_LINE = 1 << 16  # one name or number that is written as text
PICKLE_SECONDS = 30.0  # a backstop: the opcodes above take one or two

# Weights. The largest networks of EDM have 296 million parameters, 1.1 GiB in float32.
HEADER = 8 * MIB  # of safetensors: names, shapes and metadata
TORCH_DIRECTORY = 16 * MIB  # of a torch archive: 100 bytes a tensor
TENSORS = 100_000
WEIGHTS = 4096 * MIB  # of the one network that is read

# Data. ImageNet has 1.3 million images; its zip has a directory of 110 MiB.
ZIP_DIRECTORY = 256 * MIB
UNPACKED = 256 * MIB  # of a .tar.gz: CIFAR-10's has 176 MiB
TAR_HEADER = MIB  # a long name or an extended header
LISTING = MIB, 1024  # bytes of dataset.json: for the file, and for each image
IMAGE = 256 * MIB  # one image, packed or not
ROWS = 20_000_000  # labels of a parquet shard
ARRAYS = 8192 * MIB  # of an .npz that is read as a whole
NPY_HEADER = 1 << 14  # shape and type of an array
PACKED = 64 * MIB, 200  # what may be packed more than 200 times: deflate reaches 1032

# Params, and what a command line asks for.
PARAMS = MIB // 4
PARAMS_VALUES = 20_000  # with aliases written out
SEEDS = 1_000_000  # images of one `fewstep sample`, which keeps them in memory
STEPS = 10_000  # of a sampler

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def number(count: int) -> str:
    """A count for a message; Python writes no integer of more than 4300 digits."""
    if abs(count) < 1 << 62:
        return f"{count:.4g}"
    return f"{'-' * (count < 0)}10^{int(count.bit_length() * 0.30103)}"


def within(count: int, most: int, what: str) -> int:
    """The count, if its budget allows for it.

    Raises:
        ValueError: it does not; the message names what was counted.
    """
    if count > most:
        shown = f"{count:,}" if count < 1 << 62 else number(count)
        raise ValueError(f"need at most {most:,} {what}, got {shown}")
    return count


def regular(path: str | os.PathLike[str]) -> Path:
    """The path of a plain file: to open a pipe waits for ever, and a device has no end.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something else is.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"need a file, got {_KINDS.get(kind, 'something else')} at {path}")
    return Path(path)


def read_small(path: str | os.PathLike[str], most: int, what: str) -> bytes:
    """The content of a file that a budget bounds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no plain file, or a larger one.
    """
    with open(regular(path), "rb") as file:
        within(os.fstat(file.fileno()).st_size, most, f"bytes of {what} in {path}")
        return file.read(most)


def read_json(text: bytes | str, most: int, what: str, objects: int = 1 << 20) -> Any:  # noqa: ANN401
    """JSON of bounded length and with a bounded number of lists and objects.

    Raises:
        ValueError: more than that, nested too deeply, or no JSON.
    """
    within(len(text), most, f"bytes of {what}")
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    within(sum(text.count(o) for o in opening), objects, f"lists and objects in {what}")  # pyright: ignore[reportArgumentType]
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None


class Bounded(io.RawIOBase):
    """A file for parsers that read as much as the file itself asks for.

    Args:
        once: bytes of one read; it may be set to another number between reads.
        total: the last place that may be read or sought; None: any.
    """

    def __init__(self, file: BinaryIO, once: int, what: str, total: int | None = None) -> None:
        self.file, self.once, self.what, self.total = file, once, what, total

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            data = self.file.read(self.once + 1)
            within(len(data), self.once, f"bytes of {self.what} at once")
            return data
        within(size, self.once, f"bytes of {self.what} at once")
        self._reach(self.file.tell() + size)
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence == os.SEEK_SET:
            self._reach(offset)
        return self.file.seek(offset, whence)

    def _reach(self, place: int) -> None:
        if self.total is not None:
            within(place, self.total, f"bytes of {self.what}")

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
