"""The loop: exact resume, ranks, refusals. Weights and logs are compared bit by bit."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from experiment import set_up, tiny_params
from fewstep import train as training
from fewstep.checkpoint import SCRATCH, Checkpoints
from fewstep.distributed import Rank
from fewstep.models import MODELS, read_safetensors
from fewstep.params import Params
from fewstep.train import Run, learning_rate_factor, train

ALONE = Rank(0, 1, torch.device("cpu"))
CLOCKS = ("seconds", "images_per_second")


class Killed(Exception):
    """Stands for the death of the process between two iterations."""


def outcome(name: str) -> tuple[bytes, list[dict[str, str]]]:
    """The model's bytes, and the log without its clocks."""
    with (MODELS / name / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
        assert all(None not in row for row in rows), "every row has the columns of the header"
        rows = [{k: v for k, v in r.items() if k not in CLOCKS} for r in rows]
    return (MODELS / name / "model.safetensors").read_bytes(), rows


def kill_at(nimg: int, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Run.iterate

    def dying(run: Run) -> None:
        if run.nimg >= nimg:
            raise Killed
        iterate(run)

    monkeypatch.setattr(Run, "iterate", dying)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    return set_up(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["teacher", "cd", "dmd2-1", "dmd2-4"])
def test_resumed_equals_uninterrupted(
    name: str, toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = toy if name != "dmd2-4" else tiny_params(Path(), students__dmd2_4__init_from="teacher")
    short = {"teacher__train__kimg": 0.512, "teacher__train__checkpoint_kimg": 0.256}
    params = tiny_params(Path(), **short) if name == "teacher" else start
    train(name, params, ALONE)
    whole = outcome(name)
    with monkeypatch.context() as patch:
        kill_at(352, patch)
        with pytest.raises(Killed):
            train(name, params, ALONE)
    train(name, params, ALONE)
    assert "resuming at 0.3 kimg" in capsys.readouterr().out
    assert outcome(name) == whole
    assert not list(SCRATCH.glob(f"{name}-*")), "states of a finished training are removed"


def test_a_run_goes_on_from_the_state_before_a_corrupt_one(
    toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tiny_params(Path(), students__cd__checkpoint_kimg=0.128)
    train("cd", params, ALONE)
    whole = outcome("cd")
    with monkeypatch.context() as patch:
        kill_at(416, patch)
        with pytest.raises(Killed):
            train("cd", params, ALONE)
    newest = sorted(SCRATCH.glob("cd-*/state-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    train("cd", params, ALONE)
    out = capsys.readouterr().out
    assert "falling back to the state before it" in out and "resuming at 0.3 kimg" in out
    assert outcome("cd") == whole


def test_two_ranks_equal_one(toy: Params, tmp_path: Path) -> None:
    tiny_params(tmp_path, data__source="toy.npz", students__cd__kimg=0.64)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = []
    for ranks in (1, 2):
        run = [*command, f"--nproc-per-node={ranks}", "-m", "fewstep", "train", "cd"]
        subprocess.run(run, check=True, env=environment, capture_output=True)
        results.append(read_safetensors(MODELS / "cd" / "model.safetensors")[0])
    one, two = results
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_ranks_that_do_not_divide_the_batch_are_told_which_would(toy: Params) -> None:
    with pytest.raises(ValueError, match=r"divides batch / batch_gpu = 2, got 3; 1, 2 would"):
        train("cd", toy, Rank(0, 3, torch.device("cpu")))


def test_sigterm_saves_and_the_next_run_goes_on(toy: Params, tmp_path: Path) -> None:
    tiny_params(tmp_path, data__source="toy.npz", students__cd__kimg=64.0)
    command = [sys.executable, "-m", "fewstep", "train", "cd"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(SCRATCH.glob("cd-*/log.csv")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in process.communicate()[0]
    assert len(list(SCRATCH.glob("cd-*/state-*"))) >= 1


def test_other_params_or_data_give_another_fingerprint(toy: Params) -> None:
    dataset = training.ImageDataset(training.DATA)
    first = training.fingerprint("cd", toy, dataset)
    other = tiny_params(Path(), data__source="toy.npz", students__cd__lr=1.0e-3)
    assert training.fingerprint("cd", other, dataset) != first
    assert training.fingerprint("dmd2-1", toy, dataset) != first
    rows = tiny_params(Path(), data__source="toy.npz", generate__images=32)
    assert training.fingerprint("cd", rows, dataset) == first, "sampling is no part of training"


def test_a_state_of_another_experiment_is_refused(toy: Params) -> None:
    linear = torch.nn.Linear(2, 2)
    Checkpoints("x", "a" * 64).save(32, {"net": linear}, {}, {})
    stranger = Checkpoints("x", "a" * 12 + "b" * 52)
    with pytest.raises(ValueError, match="need a training state of fingerprint aaaaaaaaaaaa"):
        stranger.restore({"net": linear}, {})


def test_a_second_trainer_is_refused(toy: Params) -> None:
    SCRATCH.mkdir()
    with FileLock(SCRATCH / "cd.lock"), pytest.raises(ValueError, match="another process trains"):
        train("cd", toy, ALONE)


def test_a_loss_that_is_not_finite_stops_the_run(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Consistency, "loss", lambda self, phase, batch: explode(self))
    with pytest.raises(FloatingPointError, match="student gradient is nan at nimg 0, its loss nan"):
        train("cd", toy, ALONE)


def explode(method: training.Consistency) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = sum(p.sum() for p in method.student.parameters()) * torch.tensor(float("nan"))
    return torch.as_tensor(loss), {"loss": torch.as_tensor(loss).detach()}


def test_a_teacher_of_another_shape_is_refused_not_replaced(toy: Params) -> None:
    wider = tiny_params(Path(), data__source="toy.npz", network__model_channels=32)
    with pytest.raises(ValueError, match=r"does not fit the network: \d+ differences.*network"):
        train("cd", wider, ALONE)


def test_data_of_another_resolution_are_refused(toy: Params) -> None:
    other = tiny_params(Path(), data__resolution=32)
    with pytest.raises(ValueError, match=r"data\.resolution"):
        train("cd", other, ALONE)


def test_an_unknown_student_is_named_with_the_known_ones(toy: Params) -> None:
    with pytest.raises(ValueError, match="need a student of cd, dmd2-1, dmd2-4, got 'ddim'"):
        train("ddim", toy, ALONE)


@pytest.mark.parametrize(
    ("schedule", "late"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.1464466)]
)
def test_learning_rate_warms_up_and_then_follows_its_schedule(
    schedule: str, late: float, tmp_path: Path
) -> None:
    overrides = {
        "students__cd__kimg": 10.0,
        "students__cd__lr_warmup_kimg": 2.0,
        "students__cd__lr_schedule": schedule,
    }
    block = tiny_params(tmp_path, **overrides).students["cd"]
    assert learning_rate_factor(block, 0) == 0
    assert learning_rate_factor(block, 1000) == 0.5
    assert learning_rate_factor(block, 2000) == 1
    assert learning_rate_factor(block, 8000) == pytest.approx(late)
