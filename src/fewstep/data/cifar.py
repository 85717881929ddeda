"""CIFAR-10 as its home serves it, cifar-10-binary.tar.gz (Krizhevsky 2009): no pickles in it.

Each `data_batch_<n>.bin` is a sequence of records: a byte of label, then the bytes of CHW pixels.
"""

import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # bytes
_LARGEST = 100_000 * _RECORD  # a batch has 10,000 records
_BATCH = re.compile(r"(?:.*/)?data_batch_([0-9]+)\.bin")


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training images, uint8 (N, 3, 32, 32), and labels, int64 (N,), in the order of the batches.

    Nothing is written to the disk; the test batch is left out.

    Raises:
        ValueError: not a whole .tar.gz, no batches in it, or a batch that is not whole records.
    """
    try:
        batches = dict(sorted(_batches(path)))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"need a whole .tar.gz, got {path}: {error} (params.yaml: data.source)"
        ) from error
    if not batches:
        raise ValueError(
            f"need the data_batch_<n>.bin of CIFAR-10's binary version in {path}, got none "
            "(params.yaml: data.source)"
        )
    records = np.concatenate([_records(content, path) for content in batches.values()])
    return records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64)


def _batches(path: Path) -> list[tuple[int, bytes]]:
    """Number and content of each batch."""
    found = []
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            match = _BATCH.fullmatch(member.name)
            file = tar.extractfile(member) if match and member.isfile() else None
            if match and file is not None and member.size <= _LARGEST:
                found.append((int(match[1]), file.read()))
    return found


def _records(content: bytes, path: Path) -> np.ndarray:
    if not content or len(content) % _RECORD:
        raise ValueError(
            f"need records of {_RECORD} bytes in each batch of {path}, got {len(content)} bytes "
            "(params.yaml: data.source)"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
