"""The pages of an LMDB file, checked before LMDB follows them.

LMDB trusts its file: a damaged offset leads it behind the end of the mapping, where the kernel
kills the process (SIGBUS, SIGSEGV) before anything can be said. So the tree is walked here first,
with bounds, from the two meta pages down to the leaves. Images that have pages of their own are not
read, only where they are. 200,000 of them take 0.1 s when the tree is cached; for ImageNet at
64x64 it is 100 MB in 24,000 pages of 21 GB, which take a disk some seconds.

Format: lmdb 0.9, `struct MDB_page`, `MDB_node` and `MDB_meta` of mdb.c on a 64-bit machine.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# A page's header, then MDB_meta with the records of the free pages and of the entries.
_META = struct.Struct("<8x2xH4x II QQ 48s IHHQQQQQ QQ")
_PAGE_SIZE = struct.Struct("<I")  # at the start of the record of the free pages
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16  # bytes of a page before the offsets of its nodes
_NODE = 8  # bytes of a node before its key
_BRANCH, _LEAF, _META_PAGE = 1, 2, 8
_KIND = 0x6F  # the bits of a page's flags that say what it is
_BIG, _DATABASE = 1, 2  # flags of a node: its value has pages of its own, or is a database
_DEEPEST = 32  # levels that LMDB can follow
_EMPTY = 2**64 - 1  # the root of a database without entries
_AT_ONCE = 1024  # pages


@dataclass(frozen=True)
class _Meta:
    """What a meta page says: bytes of a page, then of the entries their tree, and the last page."""

    page: int
    flags: int
    depth: int
    root: int
    last: int
    transaction: int


@dataclass(frozen=True)
class _File:
    path: Path
    descriptor: int
    page: int
    last: int

    def damaged(self, number: int, what: str) -> ValueError:
        return ValueError(
            f"need an intact LMDB, got {what} in page {number} of {self.path}; copy or build it "
            "again (params.yaml: data.source)"
        )

    def read(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers and bytes (N, page) of these pages, some at a time."""
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            raw = b"".join(
                os.pread(self.descriptor, self.page, n * self.page) for n in some.tolist()
            )
            yield some, np.frombuffer(raw, np.uint8).reshape(len(some), self.page)


def check_pages(path: Path) -> None:
    """Refuse an LMDB file that LMDB could not read to its end; what is no LMDB is left to LMDB.

    Raises:
        ValueError: the file is truncated, or a page of it is damaged.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        metas = list(_metas(descriptor))
        if len(metas) == 2:
            _check_tree(path, descriptor, *metas)
    finally:
        os.close(descriptor)


def _metas(descriptor: int) -> Iterator[_Meta]:
    """The two meta pages; fewer where LMDB itself will refuse the file."""
    place = 0
    for _ in range(2):
        raw = os.pread(descriptor, _META.size, place)
        if len(raw) < _META.size:
            return
        kind, magic, version, _, _, free, _, flags, depth, *_, root, last, transaction = (
            _META.unpack(raw)
        )
        if not kind & _META_PAGE or (magic, version) != (_MAGIC, _VERSION):
            return
        place = _PAGE_SIZE.unpack_from(free)[0]
        yield _Meta(place, flags, depth, root, last, transaction)


def _check_tree(path: Path, descriptor: int, first: _Meta, second: _Meta) -> None:
    meta = second if second.transaction > first.transaction else first  # as LMDB chooses
    file = _File(path, descriptor, meta.page, meta.last)
    sizes = {first.page, second.page}
    if len(sizes) > 1 or meta.page not in (512 << i for i in range(7)) or meta.flags:
        raise file.damaged(0, f"pages of {sizes} bytes and flags {meta.flags}")
    need, size = (meta.last + 1) * meta.page, os.fstat(descriptor).st_size
    if size < need:
        raise ValueError(
            f"need {need} bytes, got {size} in {path}: truncated; copy or build it again "
            "(params.yaml: data.source)"
        )
    if meta.root == _EMPTY:
        return
    if not 1 <= meta.depth <= _DEEPEST or not 2 <= meta.root <= meta.last:
        raise file.damaged(0, f"root {meta.root} and {meta.depth} levels")
    level = np.array([meta.root], np.uint64)
    for below in reversed(range(meta.depth)):
        children = [_check_level(file, *pages, leaves=below == 0) for pages in file.read(level)]
        level = np.unique(found := np.concatenate(children))
        if len(level) < len(found):
            raise file.damaged(int(level[0]), "more than one way to a page, the first perhaps")


def _check_level(
    file: _File, numbers: np.ndarray, pages: np.ndarray, *, leaves: bool
) -> np.ndarray:
    """Check pages (N, page) of one level, and return the numbers of those that they lead to."""
    words = pages.view("<u2")
    flags, lower, upper = (words[:, i].astype(np.int64) for i in (5, 6, 7))
    own = pages[:, :8].copy().view("<u8")[:, 0]
    kind, fewest = (_LEAF, 1) if leaves else (_BRANCH, 2)

    def refuse(wrong: np.ndarray, what: str, rows: np.ndarray | None = None) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise file.damaged(int(numbers[row if rows is None else rows[row]]), what)

    refuse((own != numbers) | (flags & _KIND != kind), "another page")
    entries = (lower - _HEADER) // 2
    refuse(
        (entries < fewest) | (lower > upper) | (upper > file.page) | (lower % 2 > 0), "bad bounds"
    )
    rows = np.repeat(np.arange(len(pages)), entries)
    place = np.arange(len(rows)) - np.repeat(entries.cumsum() - entries, entries)
    start = words[rows, _HEADER // 2 + place].astype(np.int64)
    refuse(
        (start < upper[rows]) | (start + _NODE > file.page) | (start % 2 > 0), "a bad offset", rows
    )
    low, high, node, key = (words[rows, start // 2 + i].astype(np.int64) for i in range(4))
    value = start + _NODE + key
    if not leaves:
        refuse(value > file.page, "a key that is too long", rows)
        children = low | high << 16 | node << 32
        refuse((children < 2) | (children > file.last), "a way to no page", rows)
        return children.astype(np.uint64)
    big, size = node == _BIG, low | high << 16
    refuse(~np.isin(node, (0, _BIG, _DATABASE)), "an unknown kind of value", rows)
    refuse(value + np.where(big, 8, size) > file.page, "a value that is too long", rows)
    at = value[big]
    first = pages[rows[big][:, None], at[:, None] + np.arange(8)].copy().view("<u8")[:, 0]
    count = (_HEADER + size[big] + file.page - 1) // file.page
    wrong = (first < 2) | (first > file.last) | (first + count.astype(np.uint64) > file.last + 1)
    refuse(wrong, "a value behind the end of the file", rows[big])
    return np.empty(0, np.uint64)
