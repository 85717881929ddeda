"""When one process fails, the others end within seconds, and its message is the last."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from experiment import set_up, tiny_params
from fewstep.paths import SCRATCH
from places import ROOT

pytestmark = pytest.mark.slow  # several processes that import torch
SECONDS = 30  # on a busy machine; PATIENCE is 600

# What a process does, by its number. `wait` is a collective that the other never enters; in `stuck`
# the main thread hears no signal, as in a collective of NCCL.
START = """
import os, signal, sys, time
import torch, torch.distributed as dist
from fewstep.training.guards import caught_signals
from fewstep.training.launch import ranks
def stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(500)
def wait(): dist.all_reduce(torch.zeros(1))
def fail(): raise ValueError("the second GPU is on fire")
def crash(): raise RuntimeError("no memory")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def stop(): sys.exit(143)
def end(): pass
try:
    with ranks("cpu") as rank, caught_signals():
        dist.barrier()
        open(f"began-{rank.index}", "w").write(str(time.time()))
        {0}[rank.index]()
except ValueError as error:
    sys.exit(f"fewstep: {error}")
"""


def torchrun(arguments: list[str], count: int = 2) -> subprocess.CompletedProcess[str]:
    """As `fewstep` launches it, with that many processes."""
    launch = "import sys; from fewstep.training.launch import run; run(sys.argv[1:])"
    shape = ["--standalone", "--nnodes=1", f"--nproc-per-node={count}"]
    return subprocess.run(
        [sys.executable, "-c", launch, *shape, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def outcome(*actions: str) -> tuple[int, list[str], float]:
    """Exit code, the lines that were printed, and seconds since the processes had met."""
    Path("worker.py").write_text(START.replace("{0}", f"[{', '.join(actions)}]"))
    done = torchrun(["worker.py"], len(actions))
    began = float(Path("began-0").read_text())
    return done.returncode, done.stdout.splitlines(), time.time() - began


@pytest.mark.parametrize("other", ["wait", "stuck"])
@pytest.mark.parametrize("first", [True, False])
def test_an_error_of_one_ends_all_and_is_the_only_one_shown(
    first: bool, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines, seconds = outcome(*(("fail", other) if first else (other, "fail")))
    assert code == 1 and lines == ["fewstep: the second GPU is on fire"]
    assert seconds < SECONDS


def test_an_error_that_nobody_expected_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines, seconds = outcome("wait", "stuck", "crash")
    assert code == 1 and lines[-1] == "[rank2]: RuntimeError: no memory" and seconds < SECONDS
    assert all(line.startswith("[rank2]: ") for line in lines), "nobody else says anything"


@pytest.mark.parametrize("other", ["wait", "stuck"])
def test_a_killed_process_is_missed(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, lines, seconds = outcome(other, "die", "stuck")
    assert code == 128 + signal.SIGKILL and seconds < SECONDS
    assert lines == ["fewstep: process 1 was killed (out of memory? see dmesg)"]


def test_a_process_that_ends_early_or_stops_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome("lambda: time.sleep(3)", "end")[:2] == (0, [])
    assert outcome("stop", "stop")[:2] == (143, [])


def test_a_training_that_another_one_holds_is_refused_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(tmp_path, monkeypatch)
    tiny_params(tmp_path, data__source="toy.npz", students__cd__batch=16, students__cd__batch_gpu=8)
    SCRATCH.mkdir(exist_ok=True)
    with FileLock(SCRATCH / "cd.lock"):
        done = torchrun(["-m", "fewstep", "train", "cd"])
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("fewstep train: another process trains cd here")
    assert "Traceback" not in done.stdout
