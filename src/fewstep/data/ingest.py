"""A source as an LMDB and a manifest; an interrupted build resumes where it stopped.

Images that have to be decoded are first appended, in the order of the source, to a file beside
the LMDB: `.<name>.partial/images`. Each record is three int64 (LE), which are the index, the label,
and what decoding changed (bit i for CHANGES[i]), and the CHW bytes. One process then writes the
LMDB from it in the order of the keys, so its bytes depend neither on the number of workers nor on
interruptions.
"""

import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from fewstep.data.decode import CHANGES, Decoded
from fewstep.data.labelled import Source
from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.data.stream import Stream, unreadable
from fewstep.files import is_disk_full, write_json
from fewstep.progress import progress

OnError = Literal["stop", "skip"]
_HEAD = struct.Struct("<qqq")  # of a record
_FORMAT = 2  # of the partial files; raise it when they change, and old ones are discarded


def ingest(
    source: Source,
    path: Path,
    *,
    workers: int = 1,
    on_error: OnError = "stop",
    class_names: Sequence[str] | None = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Write `source` to the LMDB `path`, and a manifest to a `.json` beside it.

    Args:
        path: the LMDB file. While images are decoded, `.<name>.partial` beside it grows to about
            the size of the LMDB. It is removed at the end, and kept when the build is interrupted.
        workers: processes that decode images.
        on_error: what to do with an image that cannot be decoded: stop, or skip it.
        class_names: of the classes, instead of the source's own.

    Returns:
        The manifest: images, shape, classes, source, content_sha256, images_per_class, changed (how
        many images decoding changed, and how), skipped (file and reason of each), note.

    Raises:
        ValueError: an image that cannot be decoded, unless they are skipped; no images; a label or
            shape that the source does not promise; another build of the same LMDB is running.
        OSError: the disk is full.
    """
    skipped: list[dict[str, str]] = []
    changed: dict[str, int] = {}
    if isinstance(source, Stream):
        with _partial(path, source) as partial:
            partial.fill(source, workers, on_error, silent)
            changed = {change: n for change in CHANGES if (n := partial.changes[change])}
            skipped = [{"file": s["file"], "reason": s["reason"]} for s in partial.skipped]
            metadata = build_lmdb(partial, path, class_names=class_names, silent=silent)
    else:
        metadata = build_lmdb(source, path, class_names=class_names, silent=silent)
    per_class = np.bincount(ImageDataset(path).labels(), minlength=source.classes)
    manifest = {
        **metadata,
        "images_per_class": per_class.tolist(),
        "changed": changed,
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
    """The images of `source` decoded so far; those of another source are discarded."""
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
            images = os.open(folder / "images", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                about = source.name, source.shape, source.classes, source.class_names
                yield _Partial(folder, *about, images)
            finally:
                os.close(images)
    except Timeout as error:
        raise ValueError(f"need one build at a time, got another at work in {folder}") from error


@dataclass
class _Partial:
    """A growing file of images, and itself a `Source` of the images in it."""

    folder: Path
    name: str
    shape: tuple[int, int, int]
    classes: int
    class_names: tuple[str, ...]
    file: int

    def __post_init__(self) -> None:
        self.record = _HEAD.size + int(np.prod(self.shape))
        os.ftruncate(self.file, len(self) * self.record)  # drops a record that was cut short
        self.changes = Counter(change for i in range(len(self)) for change in self._changes(i))
        log = self.folder / "skipped"
        lines = log.read_text().split("\n")[:-1] if log.is_file() else []  # the last may be cut
        logged: list[dict[str, Any]] = [json.loads(line) for line in lines]
        # the log is flushed line by line, so it can be ahead of the images after a crash
        self.skipped = [s for s in logged if s["index"] < self.next]
        log.write_text("".join(json.dumps(s) + "\n" for s in self.skipped))

    def __len__(self) -> int:
        return os.fstat(self.file).st_size // self.record

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]:
        raw = os.pread(self.file, self.record, index * self.record)
        image = np.frombuffer(raw, np.uint8, offset=_HEAD.size).reshape(self.shape)
        return image, _HEAD.unpack_from(raw)[1]

    @property
    def next(self) -> int:
        """Index in the source of the first image after the last one in the file."""
        last = len(self) - 1
        return 1 + self._head(last)[0] if last >= 0 else 0

    def _head(self, index: int) -> tuple[int, int, int]:
        return _HEAD.unpack(os.pread(self.file, _HEAD.size, index * self.record))

    def _changes(self, index: int) -> list[str]:
        bits = self._head(index)[2]
        return [change for i, change in enumerate(CHANGES) if bits >> i & 1]

    def fill(self, source: Stream, workers: int, on_error: OnError, silent: bool) -> None:
        """Append the images of the source that are still missing."""
        start = self.next
        if start and not silent:
            print(f"build-lmdb: resumes after {start} of {len(source)} images", flush=True)
        if self.skipped and on_error == "stop":
            raise unreadable(self.skipped[0]["file"], self.skipped[0]["reason"], self.name)
        with (
            progress(len(source), "decode", initial=start, silent=silent) as bar,
            (self.folder / "skipped").open("a") as log,
        ):
            for index, decoded in enumerate(source.read(start, workers), start):
                if decoded.image is not None:
                    self._append(index, decoded)
                elif on_error == "stop":
                    raise unreadable(decoded.where, decoded.reason, self.name)
                else:
                    skip = {"index": index, "file": decoded.where, "reason": decoded.reason}
                    print(json.dumps(skip), file=log, flush=True)
                    self.skipped.append(skip)
                bar.update()

    def _append(self, index: int, decoded: Decoded) -> None:
        assert decoded.image is not None, "the caller looked"
        bits = sum(1 << CHANGES.index(change) for change in decoded.changes)
        raw = _HEAD.pack(index, decoded.label, bits) + decoded.image.tobytes()
        try:
            written = os.write(self.file, raw)
            if written < len(raw):  # the disk filled up within a record; the rest raises ENOSPC
                os.write(self.file, raw[written:])
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise OSError(
                error.errno,
                f"disk full at image {index}; {self.folder} is kept, run again to resume there",
            ) from error
        self.changes.update(decoded.changes)
