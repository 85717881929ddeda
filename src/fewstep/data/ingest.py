"""A source as an LMDB and a manifest; an interrupted build goes on where it stopped.

Images that must be decoded are first appended to a file beside the LMDB, in the order of the
source: `.<name>.partial/images`, a record each of index, label (int64 LE) and CHW bytes. The LMDB
is then written from it in the order of its keys, by one process: its bytes depend on neither the
number of workers nor on interruptions.
"""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from filelock import FileLock, Timeout

from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.data.sources import Source
from fewstep.data.stream import Stream, unreadable
from fewstep.files import is_disk_full, write_json
from fewstep.progress import progress

OnError = Literal["stop", "skip"]
_FORMAT = 1  # of the partial files: a change makes old ones start over


def ingest(
    source: Source,
    path: Path,
    *,
    workers: int = 1,
    on_error: OnError = "stop",
    silent: bool = False,
) -> dict[str, Any]:
    """Write `source` to the LMDB `path`, and what went in to a `.json` beside it.

    Args:
        path: the LMDB file. While images are decoded, `.<name>.partial` beside it grows to about
            the size of the LMDB; it is removed in the end, and kept when the build is interrupted.
        workers: processes that decode images.
        on_error: what an image that cannot be decoded does: stop the build, or be left out.

    Returns:
        The manifest: images, shape, classes, source, content_sha256, images_per_class, skipped
        (file and reason of each), note.

    Raises:
        ValueError: an image that cannot be decoded, unless they are skipped; no images; a label or
            shape that the source does not promise; another build at work on the same LMDB.
        OSError: the disk is full.
    """
    skipped: list[dict[str, str]] = []
    if isinstance(source, Stream):
        with _partial(path, source) as partial:
            partial.fill(source, workers, on_error, silent)
            skipped = [{"file": s["file"], "reason": s["reason"]} for s in partial.skipped]
            metadata = build_lmdb(partial, path, silent=silent)
    else:
        metadata = build_lmdb(source, path, silent=silent)
    manifest = {
        **metadata,
        "images_per_class": np.bincount(
            ImageDataset(path).labels(), minlength=source.classes
        ).tolist(),
        "skipped": skipped,
        "note": source.note if isinstance(source, Stream) else "",
    }
    write_json(path.with_suffix(".json"), manifest)
    shutil.rmtree(_folder(path), ignore_errors=True)
    return manifest


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial")


@contextmanager
def _partial(path: Path, source: Stream) -> Generator["_Partial"]:
    """The decoded images of `source` so far: none, if what is there is of another source."""
    folder = _folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": _FORMAT, "source": source.name, "fingerprint": source.fingerprint}
    try:
        with FileLock(folder / "lock", timeout=0):
            file = folder / "source.json"
            if not file.is_file() or file.read_text() != json.dumps(about):
                for name in ("images", "skipped"):
                    (folder / name).unlink(missing_ok=True)
                file.write_text(json.dumps(about))
            with _Partial.open(folder, source) as partial:
                yield partial
    except Timeout as error:
        raise ValueError(f"need one build at a time, got another at work in {folder}") from error


@dataclass
class _Partial:
    """A growing file of images, and itself a `Source` of those that it holds."""

    folder: Path
    name: str
    shape: tuple[int, int, int]
    classes: int
    file: int
    skipped: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, source: Stream) -> Self:
        file = os.open(folder / "images", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self = cls(folder, source.name, source.shape, source.classes, file, [])
        os.ftruncate(file, len(self) * self._record)  # a record that was cut short
        self.skipped = [s for s in self._logged() if s["index"] < self.next]
        text = "".join(json.dumps(s) + "\n" for s in self.skipped)
        (folder / "skipped").write_text(text)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def __len__(self) -> int:
        return os.fstat(self.file).st_size // self._record

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        raw = os.pread(self.file, self._record, index * self._record)
        return np.frombuffer(raw, np.uint8, offset=16).reshape(self.shape), _int64(raw[8:16])

    @property
    def _record(self) -> int:
        return 16 + int(np.prod(self.shape))

    @property
    def next(self) -> int:
        """Index in the source of the image behind the last one that is here."""
        last = len(self) - 1
        return 1 + _int64(os.pread(self.file, 8, last * self._record)) if last >= 0 else 0

    def _logged(self) -> list[dict[str, Any]]:
        """What was skipped before; the last line may be cut short."""
        log = self.folder / "skipped"
        lines = log.read_text().split("\n")[:-1] if log.is_file() else []
        return [json.loads(line) for line in lines]

    def fill(self, source: Stream, workers: int, on_error: OnError, silent: bool) -> None:
        """Append the images of the source from the first missing one on."""
        start = self.next
        if start and not silent:
            print(f"build-lmdb: goes on behind {start} of {len(source)} images", flush=True)
        if self.skipped and on_error == "stop":
            raise unreadable(self.skipped[0]["file"], self.skipped[0]["reason"], self.name)
        with (
            progress(len(source), "decode", initial=start, silent=silent) as bar,
            (self.folder / "skipped").open("a") as log,
        ):
            for index, decoded in enumerate(source.read(start, workers), start):
                if decoded.image is not None:
                    self._append(index, decoded.label, decoded.image.tobytes())
                elif on_error == "stop":
                    raise unreadable(decoded.where, decoded.reason, self.name)
                else:
                    skip = {"index": index, "file": decoded.where, "reason": decoded.reason}
                    print(json.dumps(skip), file=log, flush=True)
                    self.skipped.append(skip)
                bar.update()

    def _append(self, index: int, label: int, pixels: bytes) -> None:
        raw = index.to_bytes(8, "little") + label.to_bytes(8, "little", signed=True) + pixels
        try:
            written = os.write(self.file, raw)
            if written < len(raw):  # the disk filled up inside of a record
                os.write(self.file, raw[written:])
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise OSError(
                error.errno,
                f"disk full at image {index}; {self.folder} is kept, run again to go on there",
            ) from error


def _int64(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)
