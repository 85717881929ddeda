"""CIFAR-10 as its authors publish it, cifar-10-binary.tar.gz (Krizhevsky 2009), without pickles.

Each `data_batch_<n>.bin` is a sequence of records: one byte of label, then the pixels as CHW bytes.
"""

import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

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
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"need an intact .tar.gz, got {path}: {error} (params.yaml: data.source)"
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
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            match = _BATCH.fullmatch(member.name)
            file = tar.extractfile(member) if match and member.isfile() else None
            if match and file is not None and member.size <= _LARGEST:
                found.append((int(match[1]), file.read()))
    return found
