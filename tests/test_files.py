"""Atomic writes under failure, JSON, sha256."""

import errno
import hashlib
import json
import math
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
from safetensors.numpy import save_file

from fewstep.files import atomic_path, read_json, replace_folder, sha256_file, write_json


def test_atomic_path_writes_whole_files_and_creates_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.npz"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".npz"
        np.savez(temporary, images=np.arange(3))
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]
    assert np.load(path)["images"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(interruption), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise interruption
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_full_disk_is_named_and_keeps_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.txt"
    with pytest.raises(OSError, match=r"limit reached.*x\.txt.*nothing half-written") as caught:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            if moment == "write":
                full()
            monkeypatch.setattr(os, "fsync", full)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def by_safetensors(path: Path) -> None:
    save_file({"x": np.zeros(3)}, path)


def by_lmdb(path: Path) -> None:
    lmdb.open(str(path), subdir=False, lock=False).close()


def by_hand(path: Path) -> None:
    path.write_text("x")
    path.chmod(0o400)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("write", [by_safetensors, by_lmdb, by_hand])
def test_the_umask_decides_who_reads_a_file_whatever_writes_it(
    write: Callable[[Path], None], umask: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "x.npz") as path:
            write(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.npz").stat().st_mode) == 0o666 & ~umask
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


LIMITED = """
import sys, errno
import numpy as np
from safetensors.numpy import save_file
from fewstep.data.lmdb import build_lmdb
from fewstep.data.labelled import ArraySource
from fewstep.files import atomic_path
writer, path = sys.argv[1:]
big = np.zeros((4000, 1, 32, 32), np.uint8)
try:
    with atomic_path(path) as t:
        if writer == "write_bytes": t.write_bytes(big.tobytes())
        if writer == "savez": np.savez(t, big=big)
        if writer == "safetensors": save_file({"big": big}, t)
        if writer == "torch":
            import torch
            torch.save(torch.from_numpy(big), t)
        if writer == "lmdb": build_lmdb(ArraySource("a", big, np.zeros(4000, int), 1), path)
except OSError as error:
    assert error.errno == errno.ENOSPC
    print(error)
"""


@pytest.mark.parametrize("writer", ["write_bytes", "savez", "safetensors", "torch", "lmdb"])
def test_every_writer_that_meets_a_real_limit_reports_it_and_leaves_nothing(
    tmp_path: Path, writer: str
) -> None:
    """RLIMIT_FSIZE fails inside write(2), half-way, as a full disk does."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, writer, str(tmp_path / "out.npz")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "limit reached while writing" in result.stdout and "out.npz" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_keeps_the_order_and_comes_back(tmp_path: Path) -> None:
    path, obj = tmp_path / "x.json", {"b": 1, "a": [1.5, None, "é"]}
    write_json(path, obj)
    assert path.read_text(encoding="utf-8") == json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    assert list(read_json(path)) == ["b", "a"]


def test_json_refuses_nan_and_names_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"need finite numbers in .*x\.json, got NaN"):
        write_json(path, {"fid": math.nan})
    assert not path.exists()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"need JSON in .*x\.json"):
        read_json(path)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 1_000_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_a_replaced_folder_holds_the_copy_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    replace_folder(source, target)
    assert list(target.iterdir()) == [], "no source: an empty folder"
    source.mkdir()
    (source / "new").write_text("1")
    (target / "old").write_text("0")
    replace_folder(source, target)
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("new", "1")]
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_json_shows_what_a_terminal_would_obey(tmp_path: Path) -> None:
    value = {"é\x9b2J": "\u202e\x1b[0m😀\n", "plain": "ü"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert read_json(tmp_path / "x.json") == value
    assert text.replace("\n", "").isprintable() and "é" in text and "😀" in text
