"""Images in Hugging Face parquet shards: columns `image` {bytes, path} and `label`."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.lmdb import check_labels
from fewstep.data.stream import FileStream, fingerprint


@dataclass(frozen=True)
class ParquetPart:
    file: str
    label: int
    group: int
    row: int

    @property
    def where(self) -> str:
        return f"{Path(self.file).name}, row group {self.group}, row {self.row}"

    def read(self) -> bytes:
        data = _images(self.file, self.group)[self.row].as_py()
        if data is None:
            raise ValueError("its image has a path and no bytes")
        return data


@lru_cache(maxsize=1)
def _images(file: str, group: int) -> Any:  # noqa: ANN401
    """The bytes of a row group's images; neighbours are asked for one after the other."""
    table = _pyarrow().ParquetFile(file).read_row_group(group, ["image.bytes"])
    return table.column("image").combine_chunks().field("bytes")


@dataclass(frozen=True)
class _ParquetParts:
    files: list[str]
    groups: np.ndarray  # (G, 3) int64: file, row group in it, first image
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> ParquetPart:
        at = int(np.searchsorted(self.groups[:, 2], index, "right")) - 1
        file, group, first = self.groups[at].tolist()
        return ParquetPart(self.files[file], int(self.labels[index]), group, index - first)


def open_parquet(path: Path, resolution: int, channels: int, classes: int) -> FileStream:
    """The rows of one shard, or of the shards in a folder (or its `data`), in the order of names.

    Where shards are named `train-...`, the others are left out. Images may have any size and are
    cropped and resized.

    Raises:
        ValueError: pyarrow is missing, no such shards, other columns, or labels that do not fit.
    """
    files = shards(path)
    groups: list[tuple[int, int, int]] = []
    labels: list[np.ndarray] = []
    count = 0
    for number, file in enumerate(files):
        sizes, values = _survey(file)
        for group, size in enumerate(sizes):
            groups.append((number, group, count))
            count += size
        labels.append(values)
    every = np.concatenate(labels)
    if not count:
        raise ValueError(f"need at least 1 image, got 0 in {path} (params.yaml: data.source)")
    check_labels(every, classes, path)
    shape = (channels, resolution, resolution)
    status = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    parts = _ParquetParts([str(f) for f in files], np.array(groups, np.int64), every)
    return FileStream(path.name, shape, classes, fingerprint(status, shape), "", parts, fit=True)


def shards(path: Path) -> list[Path]:
    """The parquet files that `path` names, [] if none."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    found = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    return [file for file in found if file.name.startswith("train")] or found


def _survey(file: Path) -> tuple[list[int], np.ndarray]:
    """Rows of each row group, and the labels (N,)."""
    try:
        shard = _pyarrow().ParquetFile(file)
        columns = {field.name: str(field.type) for field in shard.schema_arrow}
        image, kind = columns.get("image", ""), columns.get("label", "")
        if not re.search("bytes: (large_)?binary", image) or "int" not in kind:
            raise ValueError(f"columns {columns}")
        label = shard.read(["label"]).column("label")
        if label.null_count:
            raise ValueError(f"{label.null_count} rows without a label")
        metadata = shard.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        return sizes, label.to_numpy().astype(np.int64)
    except (ValueError, OSError) as error:  # those of pyarrow are ValueErrors
        raise ValueError(
            f"need parquet with columns image (bytes, path) and label (integers), got {file}: "
            f"{error} (params.yaml: data.source)"
        ) from error


def _pyarrow() -> Any:  # noqa: ANN401
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "need pyarrow for parquet shards, got none: pip install 'fewstep[parquet]' "
            "(params.yaml: data.source)"
        ) from error
    return pyarrow.parquet
