"""CIFAR-10 as its authors publish it, cifar-10-binary.tar.gz (Krizhevsky 2009), without pickles.

Each `data_batch_<n>.bin` is a sequence of records: one byte of label, then the pixels as CHW bytes.
"""

import gzip
import re
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from fewstep.arrays import DAMAGE
from fewstep.budgets import TAR_HEADER, UNPACKED, Bounded, regular
from fewstep.quoting import printable

SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # bytes
_LARGEST = 100_000 * _RECORD  # ten times a real batch: limits what a hostile archive can unpack
_BATCH = re.compile(r"(?:.*/)?data_batch_([0-9]{1,4})\.bin")


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training images, uint8 (N, 3, 32, 32), and labels, int64 (N,), in the order of the batches.

    Nothing is written to the disk. The test batch is left out.

    Raises:
        ValueError: not an intact .tar.gz, no batches in it, a batch that is missing between
            others, or one with a partial record.
    """
    try:
        batches = dict(sorted(_batches(path)))
    except (tarfile.TarError, *DAMAGE) as error:
        raise ValueError(
            f"need an intact .tar.gz, got {path}: {printable(str(error), keep='')} "
            "(params.yaml: data.source)"
        ) from error
    if not batches:
        raise ValueError(
            f"need the data_batch_<n>.bin of CIFAR-10's binary version in {path}, got none "
            "(params.yaml: data.source)"
        )
    if missing := sorted(set(range(1, max(batches))) - batches.keys()):
        raise ValueError(
            f"need data_batch_1.bin to data_batch_{max(batches)}.bin as files of at most "
            f"{_LARGEST} bytes in {path}, got no data_batch_{missing[0]}.bin "
            "(params.yaml: data.source)"
        )
    for content in batches.values():
        if not content or len(content) % _RECORD:
            raise ValueError(
                f"need records of {_RECORD} bytes in each batch of {path}, got {len(content)} "
                "bytes (params.yaml: data.source)"
            )
    records = np.frombuffer(b"".join(batches.values()), np.uint8).reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64)


def _batches(path: Path) -> list[tuple[int, bytes]]:
    """Number and content of each batch."""
    found = []
    with gzip.open(regular(path)) as packed:
        # A long name, or what a member is said to have, may unpack to gigabytes.
        content = Bounded(cast(Any, packed), TAR_HEADER, "an unpacked .tar.gz", UNPACKED)
        with tarfile.open(fileobj=cast(Any, content), mode="r:") as tar:
            for member in tar:
                match = _BATCH.fullmatch(member.name)
                if match and member.isreg() and member.size <= _LARGEST:
                    found.append((int(match[1]), _content(content, member)))
    return found


def _content(packed: Bounded, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member; the place in the archive stays as it was."""
    place = packed.tell()
    packed.seek(member.offset_data)
    parts = [
        packed.read(min(TAR_HEADER, member.size - start))
        for start in range(0, member.size, TAR_HEADER)
    ]
    packed.seek(place)
    if sum(map(len, parts)) < member.size:
        raise EOFError("it ends within a batch")
    return b"".join(parts)
