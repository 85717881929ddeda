"""Images in Hugging Face parquet shards: columns `image` {bytes, path} and `label`."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.budgets import HEADER, ROWS, read_json, regular, within
from fewstep.data.labelled import check_labels, classes_in
from fewstep.data.stream import FileStream, fingerprint, state_of
from fewstep.quoting import listed, printable

_COUNTED = re.compile(r"(.*?)([0-9]{1,9})-of-([0-9]{1,9})(?:-[0-9a-f]+)?")
_NUMBERED = re.compile(r"(.*?)([0-9]{1,9})")


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
            raise ValueError("its image has a path but no bytes")
        return data


# One entry is enough: a chunk's rows come in order, and a row group can take 100 MB.
@lru_cache(maxsize=1)
def _images(file: str, group: int) -> Any:  # noqa: ANN401
    """The bytes of the images in a row group."""
    table = _pyarrow().ParquetFile(file).read_row_group(group, ["image.bytes"])
    return table.column("image").combine_chunks().field("bytes")


def open_parquet(path: Path, shape: tuple[int, int, int], classes: int | None) -> FileStream:
    """The rows of one shard, or of the shards in a folder (or its `data`), in order of names.

    If some shards are named `train-...`, the others are left out. Images may have any size and
    are cropped and resized.

    Raises:
        ValueError: pyarrow is missing, a shard is, other columns, or labels that do not fit.
    """
    files = shards(path)
    if path.is_dir():
        _check_complete(path, files)
    surveys = [_survey(file) for file in files]
    groups = [(n, g) for n, (sizes, _) in enumerate(surveys) for g in range(len(sizes))]
    ends = np.cumsum([size for sizes, _ in surveys for size in sizes], dtype=np.int64)
    labels = np.concatenate([values for _, values in surveys])
    if not len(labels):
        raise ValueError(f"need at least 1 image, got 0 in {path} (params.yaml: data.source)")
    named = _class_names(files[0])
    if classes is None:
        classes = max(len(named), classes_in(labels))
    check_labels(labels, classes, path)

    def part(i: int) -> ParquetPart:
        at = int(np.searchsorted(ends, i, "right"))
        (file, group), first = groups[at], int(ends[at - 1]) if at else 0
        return ParquetPart(str(files[file]), int(labels[i]), group, i - first)

    facts = fingerprint(map(state_of, files), shape)
    named = named if len(named) == classes else ()
    about = path.name, shape, labels, classes, facts, ""
    return FileStream(*about, part, fit=True, class_names=named)


def shards(path: Path) -> list[Path]:
    """The parquet files that `path` is or holds; [] if none."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    found = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    return [file for file in found if file.name.startswith("train")] or found


def _check_complete(path: Path, files: list[Path]) -> None:
    """Refuse a folder where a shard is missing, by the numbers in the names of the others.

    `train-00000-of-00004`, a hash may follow, says how many there are; of `0000`, `0001`, ... or
    `part-1`, `part-2`, ... none may be missing between the others.
    """
    counted, numbered = defaultdict[tuple[str, str], list[int]](list), dict[str, list[str]]()
    for stem in (file.stem for file in files):
        if match := _COUNTED.fullmatch(stem):
            counted[match[1], match[3]].append(int(match[2]))
        elif match := _NUMBERED.fullmatch(stem):
            numbered.setdefault(match[1], []).append(match[2])
    for (start, total), numbers in counted.items():
        first = 1 if int(total) in numbers else 0
        wanted = range(first, first + int(total))
        names = (f"{start}{n:0{len(total)}}-of-{total}" for n in wanted if n not in numbers)
        _refuse_missing(path, names)
        if len(numbers) > int(total) or sum(other == start for other, _ in counted) > 1:
            raise ValueError(
                f"need the shards of one data set in {path}, got two sets of {start}*-of-*.parquet "
                "(params.yaml: data.source)"
            )
    for start, texts in numbered.items():
        have = {int(text) for text in texts}
        wanted = range(min(have), max(have)) if min(have) <= 1 else ()
        width = min(map(len, texts))
        _refuse_missing(path, (f"{start}{n:0{width}}" for n in wanted if n not in have))


def _refuse_missing(path: Path, names: Iterator[str]) -> None:
    if missing := [f"{name}.parquet" for name in islice(names, 5)]:
        more = ", ..." if len(missing) == 5 else ""
        raise ValueError(
            f"need every shard in {path}, got none named {', '.join(missing)}{more} "
            "(params.yaml: data.source)"
        )


def _survey(file: Path) -> tuple[list[int], np.ndarray]:
    """The number of rows of each row group, and the labels (N,)."""
    try:
        shard = _pyarrow().ParquetFile(regular(file))
        within(shard.metadata.num_rows, ROWS, "rows in a shard")
        columns = {field.name: str(field.type) for field in shard.schema_arrow}
        image, kind = columns.get("image", ""), columns.get("label", "")
        # a label under another name must not be lost: only without integers there are no classes
        integers = [name for name, type in columns.items() if type.startswith(("int", "uint"))]
        labelled = "int" in kind
        if not re.search("bytes: (large_)?binary", image) or (not labelled and (kind or integers)):
            raise ValueError(f"columns {listed([f'{n} {t}' for n, t in columns.items()])}")
        metadata = shard.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        if not labelled:
            return sizes, np.zeros(metadata.num_rows, np.int64)
        label = shard.read(["label"]).column("label")
        if label.null_count:
            raise ValueError(f"{label.null_count} rows without a label")
        return sizes, label.to_numpy().astype(np.int64)
    except (ValueError, OSError, OverflowError, MemoryError) as error:  # and pyarrow's own
        raise ValueError(
            f"need parquet with columns image (bytes, path) and label (integers, or no column of "
            f"integers: one class), got {file}: "
            f"{printable(str(error), keep='')} (params.yaml: data.source)"
        ) from error


def _class_names(file: Path) -> tuple[str, ...]:
    """The names of the labels, where Hugging Face's description of the columns has them."""
    try:
        about = (_pyarrow().ParquetFile(file).schema_arrow.metadata or {}).get(b"huggingface", b"")
        names = read_json(about, HEADER, "a shard's description")
        names = names["info"]["features"]["label"]["names"]
        return tuple(names) if all(isinstance(name, str) for name in names) else ()
    except (ValueError, KeyError, TypeError):
        return ()


def _pyarrow() -> Any:  # noqa: ANN401
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "need pyarrow for parquet shards, got none: pip install 'fewstep[parquet]' "
            "(params.yaml: data.source)"
        ) from error
    return pyarrow.parquet
