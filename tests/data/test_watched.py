"""A watched folder: its file changes with every edit below it, and with nothing else."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.data.watched import watch

OLD = 1_000_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two class folders, one a link, last changed long ago."""
    for name in ("x/a/1.png", "x/a/deep/2.png", "store/b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"image")
    (tmp_path / "x/b").symlink_to("../store/b")
    for path in tmp_path.rglob("*"):
        os.utime(path, (OLD, OLD))
    return tmp_path / "x"


def replace(path: Path) -> None:
    """Another image of the same age, as `cp -p` makes it."""
    path.write_bytes(b"another image")
    os.utime(path, (OLD, OLD))


EDITS: dict[str, Callable[[Path], object]] = {
    "an image is replaced": lambda x: replace(x / "a/deep/2.png"),
    "an image is touched": lambda x: (x / "a/1.png").touch(),
    "an image is added": lambda x: (x / "a/deep/4.png").write_bytes(b""),
    "an image is removed": lambda x: (x / "a/deep/2.png").unlink(),
    "an image is renamed": lambda x: (x / "a/1.png").rename(x / "a/7.png"),
    "a folder is moved": lambda x: (x / "a/deep").rename(x / "a/deeper"),
    "an image behind a link is replaced": lambda x: replace(x / "b/3.png"),
    "labels are added": lambda x: (x / "dataset.json").write_text("{}"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_renews_the_file(edit: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scratch/source.json"
    watch(folder, file)
    before, content = file.stat().st_mtime_ns, file.read_text()
    EDITS[edit](folder)
    started = time.time_ns()
    watch(folder, file)
    assert file.read_text() != content
    assert file.stat().st_mtime_ns > max(before, started - 10**8)


def test_what_is_no_edit_leaves_the_file_alone(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "source.json"
    watch(folder, file)
    before = file.stat()
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails/1.png").write_bytes(b"small")
    (folder / "a/@eaDir").mkdir()
    watch(folder, file)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_new_file_is_as_old_as_the_last_edit(folder: Path, tmp_path: Path) -> None:
    """Else whoever removes `scratch` would have to train everything again."""
    (folder / "a").touch()
    edited = (folder / "a").stat().st_mtime_ns
    time.sleep(0.05)
    watch(folder, tmp_path / "source.json")
    assert (tmp_path / "source.json").stat().st_mtime_ns == edited
    os.utime(folder / "a/1.png", (2 * 10**9, 2 * 10**9))  # by a clock that is years ahead
    watch(folder, tmp_path / "again.json")
    assert (tmp_path / "again.json").stat().st_mtime_ns <= time.time_ns()
