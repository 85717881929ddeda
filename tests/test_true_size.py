"""ADM-64 at its true size: one iteration of each method on one image, within 24 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "student"), [("imagenet64-cd-seed", "cd-8"), ("imagenet64-dmd2-seed", "dmd2-10")]
)
def test_an_iteration_takes_the_memory_that_was_planned(
    preset: str, student: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "tests" / "true_size.py")]
    run = subprocess.run(
        [*command, str(ROOT / "config" / f"{preset}.yaml"), student],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["bytes"] < 24e9
    assert found["bytes"] == pytest.approx(found["planned"], rel=0.15)
