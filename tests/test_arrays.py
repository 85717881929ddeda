"""Arrays as .npz: read as they were written, and the same bytes on every machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fewstep
from fewstep.arrays import save_arrays
from fewstep.files import sha256_file

ARRAYS = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "count": np.int64(7),
    "none": np.empty((0, 5)),
    "turned": np.arange(6.0).reshape(2, 3).T,
}
WRITE = """
import sys
from pathlib import Path
import numpy as np
from fewstep.arrays import save_arrays
arrays = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "count": np.int64(7),
          "none": np.empty((0, 5)), "turned": np.arange(6.0).reshape(2, 3).T}
save_arrays(Path(sys.argv[1]), arrays)
print(*sys.version_info[:3], sep=".")
"""


def test_what_is_written_is_what_numpy_reads(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz", ARRAYS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert read.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].dtype == array.dtype


def test_bytes_depend_on_neither_name_nor_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_arrays(tmp_path / "a.npz", ARRAYS)
    later = time.time() + 10**8
    monkeypatch.setattr(time, "time", lambda: later)
    save_arrays(tmp_path / "b.npz", ARRAYS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_objects_are_refused_and_leave_what_was_there(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz", ARRAYS)
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ValueError, match="[Oo]bject arrays cannot be saved"):
        save_arrays(tmp_path / "a.npz", {"x": np.array([{}])})
    assert (tmp_path / "a.npz").read_bytes() == before


def other_patch_releases() -> list[Path]:
    """Interpreters of this minor version of Python, which can import our packages."""
    minor = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += [Path("/usr/bin"), *Path.home().glob(".pyenv/versions/*/bin")]
    found = {file.resolve() for folder in folders if (file := folder / minor).is_file()}
    return sorted(found - {Path(sys.executable).resolve()})


def test_patch_releases_of_python_write_the_same_bytes(tmp_path: Path) -> None:
    places = [str(Path(module.__file__ or "").parents[1]) for module in (fewstep, np)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    hashes = {}
    for python in [Path(sys.executable), *other_patch_releases()]:
        file = tmp_path / f"{len(hashes)}.npz"
        run = [python, "-c", WRITE, file]
        version = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        hashes[version.stdout.strip()] = sha256_file(file)
    if len(hashes) < 2:
        pytest.skip("one patch release of this Python is here")
    assert len(set(hashes.values())) == 1, hashes
