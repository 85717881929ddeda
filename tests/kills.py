"""Kill trainings at random moments and see that they go on as if nothing had happened.

    python tests/kills.py [KILLS] [SEED] [STOPS]

Of every three kills one trains a teacher, one a consistency student, one a DMD2 student. Each is a
real `fewstep train` whose processes all get SIGKILL: every other one at a random moment, the rest
while a state is being written. STOPS more get SIGHUP or SIGQUIT, which must save the state where
the training stands, or lose the reader of their output, which must change nothing.

Started again, each must end with the same bytes of weights and snapshots and the same log, and must
not repeat more than one checkpoint's interval. The finished training does not keep its optimiser's
state; that it was restored shows in the weights of every later step.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from experiment import set_up, tiny_params
from fewstep.paths import BEST, MODELS, SCRATCH, SNAPSHOTS
from fewstep.training.finished import forget_finished
from fewstep.training.guards import STOPPING
from fewstep.training.log import Log

NAMES = ("teacher", "cd", "dmd2-4")
INTERVAL = 64  # images between two states
OVERRIDES = {
    "data__source": "toy.npz",
    "tracking__dvclive": False,
    "teacher__train__kimg": 1.024,
    "teacher__train__checkpoint_kimg": INTERVAL / 1000,
    "students__cd__kimg": 0.768,
    "students__cd__checkpoint_kimg": INTERVAL / 1000,
    "students__cd__validation": None,
    "students__cd__phema": {"stds": [0.05, 0.1], "snapshot_kimg": 0.256},
    "students__dmd2_4__init_from": "teacher",
    "students__dmd2_4__kimg": 0.64,
    "students__dmd2_4__checkpoint_kimg": INTERVAL / 1000,
}


def start(name: str) -> subprocess.Popen[str]:
    stage = ["download-teacher"] if name == "teacher" else ["train", name]
    return subprocess.Popen(
        [sys.executable, "-m", "fewstep", *stage],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_all,
    )


def heed_all() -> None:
    """Even if this script was started by `nohup` or in the background."""
    for kind in STOPPING:
        signal.signal(kind, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def outcome(name: str) -> dict[str, bytes]:
    folders = MODELS / name, MODELS / f"{name}{BEST}", SNAPSHOTS / name
    return {str(file): file.read_bytes() for folder in folders for file in folder.iterdir()}


def images_of(name: str) -> int:
    """How many images the finished training saw."""
    return Log(MODELS / name / "log.jsonl").rows()[-1]["nimg"]


def seen_nimg(name: str) -> int:
    """How far the running training says that it is; -1 before its first row."""
    logs = list(SCRATCH.glob(f"{name}-*/log.jsonl"))
    rows = Log(logs[0]).rows() if logs else []
    return rows[-1]["nimg"] if rows else -1


def wait_for(process: subprocess.Popen[str], name: str, at_nimg: int) -> None:
    while seen_nimg(name) < at_nimg:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def kill(process: subprocess.Popen[str], name: str, at_nimg: int, while_writing: bool) -> int:
    """SIGKILL all processes once the training is at at_nimg; gives how far it was."""
    wait_for(process, name, at_nimg)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    while while_writing and not half_written(name):
        assert process.poll() is None, "it ended before it wrote another state"
        time.sleep(0.0002)
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.communicate()
    return seen_nimg(name)


def half_written(name: str) -> list[Path]:
    return list(SCRATCH.glob(f"{name}-*/.state-*.tmp*"))


def trial(name: str, at_nimg: int, while_writing: bool, whole: object) -> tuple[int, int, bool]:
    """Kill a training, finish it, compare; where it was killed, where it went on, a write hit?"""
    forget_finished(name)
    killed_at = kill(start(name), name, at_nimg, while_writing)
    hit = bool(half_written(name))
    states = sorted(SCRATCH.glob(f"{name}-*/state-*.safetensors"))
    went_on = int(states[-1].stem.split("-")[1]) if states else 0
    output = finish(start(name))
    assert f"resuming at {went_on / 1000:.1f} kimg" in output or not went_on, output
    assert outcome(name) == whole, f"{name} killed at {killed_at} differs"
    return killed_at, went_on, hit


def stopped(name: str, at_nimg: int, kind: signal.Signals, whole: object) -> int:
    """Stop a training by a signal to its launch, finish it, compare; where it was stopped."""
    forget_finished(name)
    process = start(name)
    wait_for(process, name, at_nimg)
    process.send_signal(kind)
    output = process.communicate()[0]
    assert process.returncode == 128 + kind, output
    at = seen_nimg(name)
    state = sorted(SCRATCH.glob(f"{name}-*/state-*.safetensors"))[-1]
    went_on = int(state.stem.split("-")[1])
    assert went_on >= at and f"stopped at {went_on / 1000:.1f} kimg" in output, output
    assert f"resuming at {went_on / 1000:.1f} kimg" in finish(start(name))
    assert outcome(name) == whole, f"{name} stopped at {went_on} differs"
    return went_on


def unread(name: str, at_nimg: int, whole: object) -> int:
    """Close the pipe that a training writes to; it must go on to its end."""
    forget_finished(name)
    process = start(name)
    wait_for(process, name, at_nimg)
    at = seen_nimg(name)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 0 and outcome(name) == whole, f"{name} unread at {at} differs"
    return at


def run(kills: int, seed: int, stops: int) -> None:
    """Raises AssertionError when a training did not go on as it should."""
    rng, wholes, lengths = random.Random(seed), {}, {}
    for name in NAMES:
        finish(start(name))
        wholes[name], lengths[name] = outcome(name), images_of(name)
        print(f"{name}: {lengths[name]} images uninterrupted", flush=True)
    lost, hits = [], 0
    for number in range(kills):
        name, while_writing = NAMES[number % 3], number % 2 == 1
        at = rng.randrange(0, lengths[name] - 3 * INTERVAL)
        killed_at, went_on, hit = trial(name, at, while_writing, wholes[name])
        lost.append(killed_at - went_on)
        hits += hit
        moment = "while a state was written" if hit else "between two writes"
        print(f"{number + 1}: {name}, {moment}, at {killed_at}, on from {went_on}", flush=True)
    for number in range(stops):
        name, how = NAMES[number % 3], ("SIGHUP", "SIGQUIT", "a closed pipe")[number // 3 % 3]
        at = rng.randrange(0, lengths[name] - 3 * INTERVAL)
        if how == "a closed pipe":
            reached = unread(name, at, wholes[name])
        else:
            reached = stopped(name, at, signal.Signals[how], wholes[name])
        print(f"{number + 1}: {name}, {how} at {reached}: nothing lost", flush=True)
    late = [images for images in lost if images > INTERVAL]
    assert not late, f"lost more than the interval of {INTERVAL}: {late}"
    assert hits or not kills, "no write was hit"
    most = max(lost, default=0)
    print(f"{kills} killed ({hits} in a write), resumed, bit-identical; lost <= {most} images")
    print(f"{stops} stopped or unread, bit-identical; lost nothing")


def main(kills: int = 30, seed: int = 0, stops: int = 10) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        set_up(Path(folder), patch)
        teacher = tiny_params(Path(folder), **OVERRIDES)
        assert teacher.teacher.train is not None
        print(f"seed {seed}, states every {INTERVAL} images")
        run(kills, seed, stops)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
