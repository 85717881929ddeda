"""Bytes of files that are read when they are needed, and the place of a reader in them."""

import mmap
import time
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.budgets import (
    PICKLE_LINE,
    PICKLE_OPCODES,
    PICKLE_SECONDS,
    PICKLE_TEXT,
    number,
    within,
)

_CHUNK = 1 << 24  # bytes of one read


@dataclass(frozen=True, eq=False)
class Span:
    """Some bytes of a file, or of bytes in memory, that are not read yet."""

    source: str | bytes
    start: int
    length: int
    crc: int | None = None

    def read(self) -> Tensor:
        """The bytes, uint8 (length,).

        Raises:
            ValueError: fewer are there, or others than their CRC-32 says.
        """
        if isinstance(self.source, bytes):
            data = bytearray(self.source[self.start : self.start + self.length])
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        whole = torch.empty(self.length, dtype=torch.uint8)
        view = memoryview(whole.numpy())  # pyright: ignore[reportArgumentType]
        done = crc = 0
        with open(self.source, "rb") as file:
            file.seek(self.start)
            while got := file.readinto(view[done : done + _CHUNK]):
                crc = zlib.crc32(view[done : done + got], crc)
                done += got
        if done < self.length:
            raise ValueError(f"need {self.length} bytes, {done} are there")
        if self.crc not in (None, crc):
            raise ValueError(f"Bad CRC-32 of the {self.length} bytes at {self.start}")
        return whole

    def small(self, most: int = 64) -> bytes:
        """The bytes of a number."""
        within(self.length, most, "bytes of a number")
        return self.read().numpy().tobytes()


@dataclass
class Spent:
    """What the pickles of one file have cost so far; those inside other pickles count too."""

    opcodes: int = 0
    text: int = 0
    started: float = field(default_factory=time.monotonic)

    def step(self, opcodes: int = 1) -> None:
        self.opcodes += opcodes
        if self.opcodes > PICKLE_OPCODES:
            within(self.opcodes, PICKLE_OPCODES, "opcodes and copied objects in a pickle")
        if time.monotonic() - self.started > PICKLE_SECONDS:
            raise ValueError(f"need a pickle that is read in {PICKLE_SECONDS:.0f} seconds")

    def read(self, size: int) -> None:
        self.text = within(self.text + size, PICKLE_TEXT, "bytes of text in a pickle")


class Stream:
    """A pickle that is read front to back; what is copied of it counts.

    Args:
        source: the file that `data` is mapped from, or `data` itself.
        start, end: where in `data` the pickle lies.
    """

    def __init__(
        self,
        source: str | bytes,
        data: mmap.mmap | bytes,
        start: int = 0,
        end: int | None = None,
        spent: Spent | None = None,
    ) -> None:
        self.source, self.data, self.at = source, data, start
        self.end = len(data) if end is None else end
        self.size, self.spent = self.end - start, spent or Spent()

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        """The next bytes, or as many as there are."""
        self.spent.read(size)
        data = self.data[self.at : min(self.at + size, self.end)]
        self.at += len(data)
        return data

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.at, min(self.at + PICKLE_LINE, self.end))
        if end < 0 and self.end - self.at >= PICKLE_LINE:
            within(self.end - self.at, PICKLE_LINE, "bytes of a line in a pickle")
        return self.read((self.end if end < 0 else end + 1) - self.at)

    def span(self, size: int) -> Span:
        """The next bytes, which are not read now."""
        if size > (left := self.end - self.at):
            raise ValueError(f"expected {number(size)} bytes, {left} are there")
        self.at += size
        return Span(self.source, self.at - size, size)

    def inside(self, data: Span | bytes) -> "Stream":
        """A pickle inside this one."""
        if isinstance(data, bytes):
            return Stream(data, data, spent=self.spent)
        whole = data.source if isinstance(data.source, bytes) else self.data
        return Stream(data.source, whole, data.start, data.start + data.length, self.spent)
