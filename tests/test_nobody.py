"""A container's user without a name and without a home, as `docker run --user 54321` gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT

# a user who owns the files and whom no /etc/passwd names
NOBODY = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
NAMES = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT / "src"), **extra}


pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*NOBODY, "true"], capture_output=True).returncode != 0,
    reason="needs user namespaces",
)
ASKED = "import getpass, platformdirs as p; print(getpass.getuser(), p.user_config_dir('dvc'))"


@pytest.mark.parametrize("home", [{}, {"HOME": ""}, {"HOME": "/nowhere"}])
def test_make_gives_a_name_and_a_home(home: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    rule = f'show: ; @{sys.executable} -c "{ASKED}"'
    done = subprocess.run(
        [*NOBODY, "make", "-s", "--eval", rule, "show"],
        cwd=tmp_path,
        env=environment(**home),
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"fewstep {tmp_path}/scratch/home/.config/dvc\n", done.stderr


def test_make_keeps_those_that_are_there(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(
        ["make", "-s", "--eval", "show: ; @echo $$LOGNAME $$HOME", "show"],
        cwd=tmp_path,
        env=environment(LOGNAME="me", HOME=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"me {tmp_path}\n"


@pytest.mark.slow
def test_the_start_on_a_rented_machine_gives_them_too(tmp_path: Path) -> None:
    for name in ("src", "config", "scripts", "assets", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "cache", "tmp", "*.local")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for command in (["dvc", "repro", "code"], [sys.executable, "-c", ASKED]):
        start = [str(tmp_path / "scripts" / "cloud_start.sh"), "tiny", *command]
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        done = subprocess.run(
            [*NOBODY, *start],
            env=environment(WANDB_API_KEY="0" * 40, DISK_GB="0"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"fewstep {tmp_path}/scratch/home/.config/dvc\n")
