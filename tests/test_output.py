"""Output that nobody reads stops nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MANY = """
import sys
from pathlib import Path
from fewstep.output import survive_readers
from fewstep.progress import progress
survive_readers()
for i in range(2000):
    print("x" * 100, flush=i % 2 == 0)
    print("y" * 100, file=sys.stderr)
    for _ in progress(range(3), "work", clock=iter(range(0, 10**6, 20)).__next__): pass
Path("done").touch()
open("first-file", "w").write("mine")
"""


def ends(redirection: str, folder: Path, *options: str) -> None:
    python = " ".join([sys.executable, *options])
    (folder / "many.py").write_text(MANY)
    script = f"set -o pipefail; {python} many.py {redirection}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Error" not in done.stdout + done.stderr
    assert (folder / "done").exists() and (folder / "first-file").read_text() == "mine"


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize(
    "redirection", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", ">&- 2>&- <&-"]
)
def test_a_reader_that_ends_and_closed_streams_stop_nothing(
    redirection: str, options: list[str], tmp_path: Path
) -> None:
    ends(redirection, tmp_path, *options)


def test_a_terminal_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(MANY)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "many.py"], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert os.read(ours, 100)
    os.close(ours)
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


def test_a_full_disk_is_still_an_error(tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(MANY)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "many.py"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode != 0 and b"No space left" in done.stderr


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    code = (
        "import sys; from fewstep.output import survive_readers as s; s(); s()\n"
        "print('ä', end=''); print('b', file=sys.stderr); "
        "print(sys.stdout.isatty(), sys.stdout.fileno())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == ("äFalse 1\n".encode(), b"b\n")
