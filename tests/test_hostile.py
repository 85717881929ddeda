"""Every file of tests/hostile.py is refused in one line, soon, in little memory; nothing runs."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from hostile import CASES
from interop.test_import import HOSTILE
from places import ROOT

SECONDS, MEMORY = 5, 1 << 30
LONGEST = 700  # characters of a line


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One process reads them all: to start one for each would take minutes."""
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hostile.py"), str(folder / "files")],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [file.name for file in folder.iterdir()] == ["files"]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_the_corpus_holds_at_least_160_files() -> None:
    assert len(CASES) >= 200 and len(CASES) + len(HOSTILE) >= 300


@pytest.mark.parametrize("what", CASES)
def test_it_is_refused_in_one_line(what: str, outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes[what]
    assert found["kind"] in ("ValueError", "ParamsError", "OSError"), found
    assert found["message"].isprintable() and len(found["message"]) < LONGEST
    assert re.search(CASES[what].message, found["message"]), found["message"]
    assert found["seconds"] < SECONDS and found["memory"] < MEMORY
