"""The loop: exact resume, ranks, refusals. Weights and logs are compared bit by bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from experiment import set_up, tiny_params
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.files import read_json
from fewstep.method import build_method, student_block
from fewstep.methods.consistency import Consistency
from fewstep.methods.dmd2 import Dmd2
from fewstep.model import load
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.ncsnpp import NoiseFourier
from fewstep.networks.weights import read_safetensors, save_model
from fewstep.params import Params
from fewstep.paths import BEST, DATA, MODELS, SAMPLES, SCRATCH, SNAPSHOTS, TIMES
from fewstep.stages import generate
from fewstep.training import loop
from fewstep.training.checkpoint import flatten_optimizer
from fewstep.training.feed import Feed
from fewstep.training.fingerprint import Fingerprint
from fewstep.training.finished import forget_finished
from fewstep.training.log import Log
from fewstep.training.loop import Run
from fewstep.training.stopwatch import Stopwatch
from fewstep.training.tracking import Tracker
from fewstep.training.watcher import Row, Watcher

SLOW = pytest.mark.slow
ALONE = Rank(0, 1, torch.device("cpu"))
VALIDATION = {
    "every_kimg": 0.128,
    "images": 16,
    "first_seed": 1000,
    "reference_images": 40,
    "sampler": "ddim",
    "steps": 4,
    "guidance_scale": 1.0,
    "teacher": {"sampler": "euler", "steps": 4},
}
pytestmark = pytest.mark.filterwarnings("ignore:need 113 images")


class Killed(Exception):
    """Stands for the death of the process between two iterations."""


def train(name: str, params: Params, rank: Rank) -> None:
    """As the stage does: with a log."""
    loop.train(name, params, rank, Tracker())


def outcome(name: str) -> dict[str, bytes]:
    """The bytes of the models, of snapshots, and of the log, which knows no clock."""
    folders = MODELS / name, MODELS / f"{name}{BEST}", SNAPSHOTS / name
    return {str(file): file.read_bytes() for folder in folders for file in folder.iterdir()}


def kill_at(nimg: int, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Run.iterate

    def dying(run: Run) -> None:
        if run.nimg >= nimg:
            run.checkpoints.wait()
            raise Killed
        iterate(run)

    monkeypatch.setattr(Run, "iterate", dying)


def interrupted(name: str, params: Params, nimg: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train anew until nimg, and die there."""
    forget_finished(name)
    with monkeypatch.context() as patch:
        kill_at(nimg, patch)
        with pytest.raises(Killed):
            train(name, params, ALONE)


def fingerprint(name: str, params: Params, dataset: ImageDataset) -> Fingerprint:
    return Fingerprint.of(name, student_block(name, params), params, dataset)


def toy_params(**overrides: Any) -> Params:  # noqa: ANN401
    quiet = {
        "data__source": "toy.npz",
        "tracking__dvclive": False,
        "students__cd__phema": None,
        "students__cd__validation": None,
    }
    return tiny_params(Path(), **{**quiet, **overrides})


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    set_up(tmp_path, monkeypatch)
    return toy_params()


@pytest.mark.parametrize(
    "name", ["cd", "dmd2-4", *(pytest.param(n, marks=SLOW) for n in ("teacher", "dmd2-1", "mm-2"))]
)
def test_resumed_equals_uninterrupted(
    name: str, toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {
        "teacher": {"teacher__train__kimg": 0.512, "teacher__train__checkpoint_kimg": 0.256},
        "cd": {
            "students__cd__phema": {"stds": [0.05, 0.1], "snapshot_kimg": 0.128},
            "students__cd__validation": VALIDATION,
        },
        "dmd2-1": {
            "students__dmd2_1__optimizer": "radam",
            "students__dmd2_1__settings__save_critic": True,
            "precision": "bf16",
        },
        "dmd2-4": {
            "students__dmd2_4__init_from": "teacher",
            "students__dmd2_4__settings__separate_labels": True,
        },
        "mm-2": {"students__mm-2__kimg": 0.512},
    }
    params = toy_params(**overrides[name])
    finals: list[dict[str, torch.Tensor]] = []
    finish = Run.finish

    def watched(run: Run) -> None:
        flat = [flatten_optimizer(u.optimizer) for u in run.updates.values()]
        finals.append({f"{i}/{k}": v.clone() for i, f in enumerate(flat) for k, v in f.items()})
        finish(run)

    monkeypatch.setattr(Run, "finish", watched)
    train(name, params, ALONE)
    whole = outcome(name)
    interrupted(name, params, 352, monkeypatch)
    (folder,) = SCRATCH.glob(f"{name}-*/")
    (folder / "snapshots").mkdir(exist_ok=True)
    (folder / "snapshots" / ".phema.safetensors.1f.tmp").touch()  # a write that SIGKILL ended
    train(name, params, ALONE)
    assert "resuming at 0.3 kimg" in capsys.readouterr().out
    assert outcome(name) == whole
    first, again = finals
    assert first and all(torch.equal(again[key], value) for key, value in first.items())


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=SLOW)])
@pytest.mark.parametrize("name", ["teacher", "cd", "dmd2-1", "dmd2-4", "mm-2"])
def test_every_method_trains_ncsnpp_at_the_frequencies_of_its_teacher(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"network__type": "ncsnpp", "precision": precision}
    set_up(tmp_path, monkeypatch, **given)
    teacher, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    expected = teacher["model.map_noise.freqs"].mul_(0.5)  # which no seed draws
    save_model(MODELS / "teacher", teacher, about)
    own = {"students__dmd2_4__init_from": "teacher", "teacher__train__kimg": 0.16}
    params = toy_params(**given, **own)
    run = Run(name, student_block(name, params), params, ALONE, ImageDataset(DATA, 10))
    networks = list(run.averages.networks.values())
    networks += [*run.method.trained.values(), *run.method.frozen.values()]
    parts = [part for net in networks for part in net.modules() if isinstance(part, NoiseFourier)]
    assert len(parts) == len(networks)
    if name == "teacher":  # which is trained anew
        assert not torch.equal(parts[0].freqs, expected)
        expected = parts[0].freqs.clone()
    trained = {
        f"{net} {key}": p
        for net, m in run.method.trained.items()
        for key, p in m.named_parameters()
    }
    before = {key: p.detach().clone() for key, p in trained.items()}
    for _ in range(2):
        run.iterate()
    moved = [key for key, p in trained.items() if not torch.equal(p, before[key])]
    assert any("aux_residual" in key for key in moved)
    assert all(torch.equal(part.freqs, expected) for part in parts)
    run.finish()
    saved = read_safetensors(MODELS / name / "model.safetensors")[0]
    assert torch.equal(saved["model.map_noise.freqs"], expected)
    images = load(MODELS / name, device="cpu").sample(seeds=range(2))
    assert images.shape == (2, 16, 16, 1) and images.std() > 0


def test_a_model_that_nobody_noted_is_finished_again_from_its_last_state(
    toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC can die while it hashes the model, and removes it before the stage runs again.

    Nothing is trained for it.
    """
    phema = {"stds": [0.05, 0.1], "snapshot_kimg": 0.128}
    short = {"phema": phema, "checkpoint_kimg": 0.128, "validation": VALIDATION}
    params = toy_params(**{f"students__cd__{key}": value for key, value in short.items()})
    train("cd", params, ALONE)
    whole = outcome("cd")
    for folder in (MODELS / "cd", MODELS / f"cd{BEST}", SNAPSHOTS / "cd"):
        shutil.rmtree(folder)
    monkeypatch.setattr(Run, "iterate", lambda run: pytest.fail("nothing is left to train"))
    train("cd", params, ALONE)
    assert "resuming at 0.5 kimg" in capsys.readouterr().out
    assert outcome("cd") == whole
    assert len(list(SCRATCH.glob("cd-*/state-*"))) == 1
    forget_finished("cd")
    assert not list(SCRATCH.glob("cd-*"))


def test_another_training_of_that_name_forgets_a_finished_one_but_no_stopped_one(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, stopped, another = (
        toy_params(students__cd__lr=lr, students__cd__checkpoint_kimg=0.128)
        for lr in (1e-3, 2e-3, 3e-3)
    )
    interrupted("cd", stopped, 352, monkeypatch)
    train("cd", finished, ALONE)
    assert len({file.parent for file in SCRATCH.glob("cd-*/state-*")}) == 2
    train("cd", another, ALONE)
    folders = {file.parent.name for file in SCRATCH.glob("cd-*/state-*")}
    dataset, left = ImageDataset(DATA, toy.data.classes), (stopped, another)
    shas = [fingerprint("cd", params, dataset).digest for params in left]
    assert folders == {f"cd-{sha[:12]}" for sha in shas}


def test_who_uses_a_model_forgets_the_state_of_its_training(toy: Params) -> None:
    short = {"students__dmd2_4__kimg": 0.032, "students__dmd2_4__init_from": "cd"}
    for use in (
        lambda params: generate.run(params, "cd-4"),
        lambda params: train("dmd2-4", params, ALONE),
    ):
        params = toy_params(students__cd__kimg=0.064, generate__images=4, **short)
        train("cd", params, ALONE)
        assert list(SCRATCH.glob("cd-*/finished"))
        use(params)
        assert not list(SCRATCH.glob("cd-*"))


def test_a_row_of_the_best_model_uses_its_training_too(toy: Params) -> None:
    short = {"students__cd__kimg": 0.128, "students__cd__validation": VALIDATION}
    params = toy_params(generate__images=4, **short)
    train("cd", params, ALONE)
    assert list(SCRATCH.glob("cd-*/finished"))
    generate.run(params, "cd-4-best")
    assert not list(SCRATCH.glob("cd-*"))
    drawn, best = (read_json(SAMPLES / "cd-4-best.json"), read_json(MODELS / "cd@best/model.json"))
    assert drawn["model"] == "cd@best" and drawn["method"] == "consistency"
    assert drawn["kimg"] == best["kimg"] == best["best"]["nimg"] / 1000


def test_a_validation_that_comes_when_all_is_trained_chooses_the_last_model(toy: Params) -> None:
    train("cd", toy, ALONE)
    assert list((MODELS / "cd@best").iterdir()) == [], "an output, though nothing chose"
    weights, _ = read_safetensors(MODELS / "cd" / "model.safetensors")
    train("cd", toy_params(students__cd__validation=VALIDATION), ALONE)
    best, about = read_safetensors(MODELS / "cd@best" / "model.safetensors")
    assert about["kimg"] == 0.512 and all(torch.equal(best[name], weights[name]) for name in best)


SURVIVED = {
    "checkpoint_kimg": 0.032,
    "keep_checkpoints": 1,
    "max_nonfinite": 3,
    "validation": VALIDATION,
}


@pytest.mark.parametrize("key", SURVIVED)
def test_a_state_survives_an_edit_that_changes_no_weight(
    key: str, toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"students__cd__kimg": 0.192, "students__cd__checkpoint_kimg": 0.064}
    train("cd", before := toy_params(**short), ALONE)
    whole, _ = read_safetensors(MODELS / "cd" / "model.safetensors")
    interrupted("cd", before, 128, monkeypatch)
    capsys.readouterr()
    train("cd", toy_params(**{**short, f"students__cd__{key}": SURVIVED[key]}), ALONE)
    out = capsys.readouterr().out
    assert "resuming at 0.1 kimg" in out and "not resuming" not in out
    weights, _ = read_safetensors(MODELS / "cd" / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in whole.items())


def test_a_training_says_why_it_does_not_go_on_from_the_states_that_are_there(
    toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted("cd", toy_params(students__cd__lr=1e-3), 352, monkeypatch)
    (stopped,) = SCRATCH.glob("cd-*/")
    capsys.readouterr()
    short = {"students__cd__kimg": 0.064, "students__cd__settings__distance": "l2"}
    train("cd", toy_params(students__cd__lr=2e-3, **short), ALONE)
    lines = [line for line in capsys.readouterr().out.splitlines() if "not resuming" in line]
    differ = "kimg: 0.512 there, 0.064 now; student.lr: 0.001 there, 0.002 now; "
    differ += "student.settings.distance: pseudo_huber there, l2 now"
    assert lines == [
        f"train cd: not resuming from 0.256 kimg in {stopped}, which belongs to another training: "
        f"student.{differ}"
    ]
    assert list(stopped.glob("state-*")), "they are left, for who puts the params back"


def test_nothing_that_a_watcher_does_changes_a_weight(toy: Params) -> None:
    params = toy_params(students__cd__kimg=0.128)
    train("cd", params, ALONE)
    watched = (MODELS / "cd" / "model.safetensors").read_bytes()
    forget_finished("cd")
    loop.train("cd", params, ALONE)
    assert (MODELS / "cd" / "model.safetensors").read_bytes() == watched


def test_two_runs_of_a_training_write_the_same_log(toy: Params) -> None:
    params = toy_params(students__cd__kimg=0.128, students__cd__validation=VALIDATION)
    logs = []
    for _ in range(2):
        forget_finished("cd")
        train("cd", params, ALONE)
        logs.append((MODELS / "cd" / "log.jsonl").read_bytes())
    assert logs[0] == logs[1] != b""
    times = Log(TIMES / "cd.jsonl").rows()
    assert {row["nimg"] for row in times} == {32, 64, 96, 128}
    assert {*times[0]} == {
        "nimg",
        "seconds",
        "images_per_second",
        "utilisation",
        "memory_gib",
        "checkpoint_seconds",
    }


def test_a_model_says_which_loss_stands_for_its_training(toy: Params) -> None:
    short = {"students__cd__kimg": 0.032, "students__dmd2_1__kimg": 0.032}
    for name, main in (("cd", "loss"), ("dmd2-1", "loss_dm")):
        train(name, toy_params(**short), ALONE)
        assert read_json(MODELS / name / "model.json")["main_loss"] == main
        assert main in Log(MODELS / name / "log.jsonl").rows()[-1]


def test_the_phases_of_an_iteration_share_what_was_prepared_once(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = toy_params(students__dmd2_4__init_from="teacher", students__dmd2_4__batch_gpu=8)
    run = Run("dmd2-4", params.students["dmd2-4"], params, ALONE, ImageDataset(DATA))
    prepare, loss = Dmd2.prepare, Dmd2.loss
    places, used = list[int](), list[tuple[str, int, Any]]()

    def prepared(self: Dmd2, batch: Any) -> Any:  # noqa: ANN401
        places.append(batch.nimg)
        return prepare(self, batch)

    def watched(self: Dmd2, phase: str, batch: Any, made: Any) -> Any:  # noqa: ANN401
        used.append((phase, batch.nimg, made))
        return loss(self, phase, batch, made)

    monkeypatch.setattr(Dmd2, "prepare", prepared)
    monkeypatch.setattr(Dmd2, "loss", watched)
    for objective in run.objectives.values():
        vars(objective)["loss"] = run.method.loss
    for _ in range(2):
        run.iterate()
    assert places == list(range(0, 64, 8)), "once each"
    first = used[: 4 * 2]
    assert [(phase, nimg) for phase, nimg, _ in first] == [
        (phase, nimg) for phase in ("student", "critic") for nimg in (0, 8, 16, 24)
    ]
    for (_, _, of_student), (_, _, of_critic) in zip(first[:4], first[4:], strict=True):
        assert of_student is of_critic


@pytest.mark.parametrize("damage", ["flipped", pytest.param("cut", marks=SLOW)])
def test_a_run_goes_on_from_the_state_before_a_corrupt_one(
    damage: str,
    toy: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = toy_params(students__cd__checkpoint_kimg=0.128)
    train("cd", params, ALONE)
    whole = outcome("cd")
    interrupted("cd", params, 416, monkeypatch)
    newest = sorted(SCRATCH.glob("cd-*/state-*"))[-1]
    raw = bytearray(newest.read_bytes())
    raw[-5000] ^= 1
    newest.write_bytes(raw[:5000] if damage == "cut" else raw)
    train("cd", params, ALONE)
    out = capsys.readouterr().out
    assert "falling back to the state before it" in out and "resuming at 0.3 kimg" in out
    assert outcome("cd") == whole


def torchrun(ranks: int, name: str) -> dict[str, torch.Tensor]:
    """The weights of a student that `ranks` processes train, or go on with."""
    forget_finished(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = [*command, f"--nproc-per-node={ranks}", "-m", "fewstep", "train", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_safetensors(MODELS / name / "model.safetensors")[0]


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-5 relative, in the norm of each tensor.

    The bias of attention's keys is left out: a softmax does not see it, so its gradient is rounding
    alone, which Adam makes as large as any.
    """
    for key, value in a.items():
        other = b[key]
        if key.endswith("qkv.bias"):  # q, k, v are interleaved
            value, other = (t.reshape(-1, 3)[:, [0, 2]] for t in (value, other))
        error = (other - value).norm() / value.norm().clamp(min=1e-3)
        assert error <= 1e-5, f"{key}: {error:.2e}"


@pytest.mark.parametrize("name", ["cd", pytest.param("dmd2-4", marks=SLOW)])
def test_two_ranks_equal_one_after_20_steps(name: str, toy: Params) -> None:
    key = f"students__{name.replace('-', '_')}"
    toy_params(**{f"{key}__kimg": 0.64, f"{key}__batch_gpu": 8, f"{key}__init_from": "teacher"})
    one = torchrun(1, name)
    rows = Log(MODELS / name / "log.jsonl").rows()
    assert_same_weights(one, torchrun(2, name))
    for alone, shared in zip(rows, Log(MODELS / name / "log.jsonl").rows(), strict=True):
        for column in alone:
            assert shared[column] == pytest.approx(alone[column], rel=1e-3), "all ranks are logged"


@SLOW
def test_a_run_may_go_on_with_another_number_of_ranks(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = toy_params(students__cd__kimg=0.64)
    train("cd", params, ALONE)
    whole = read_safetensors(MODELS / "cd" / "model.safetensors")[0]
    interrupted("cd", params, 352, monkeypatch)
    assert_same_weights(whole, torchrun(2, "cd"))


def test_ranks_that_do_not_divide_the_batch_are_told_which_would(toy: Params) -> None:
    with pytest.raises(ValueError, match=r"divides batch / batch_gpu = 2, got 3; 1, 2 would"):
        train("cd", toy, Rank(0, 3, torch.device("cpu")))


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=SLOW) for n in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_saves_and_exits_with_its_number(number: signal.Signals, toy: Params) -> None:
    toy_params(students__cd__kimg=64.0)
    command = [sys.executable, "-c", "from fewstep.cli import main; main(['train', 'cd'])"]
    worker = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {"WORLD_SIZE": "1"}
    alone = {**os.environ, "OMP_NUM_THREADS": "1", **worker}
    process = subprocess.Popen(
        command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not any(log.stat().st_size for log in SCRATCH.glob("cd-*/log.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output and "run the same command to continue" in output
    assert len(list(SCRATCH.glob("cd-*/state-*"))) >= 1


CONTINUED = {
    "students__dmd2_1__kimg": 0.064,
    "students__dmd2_1__settings__save_critic": True,
    "students__dmd2_4__init_from": "dmd2-1",
    "students__dmd2_4__settings__continue_critic": True,
}


def critic_weights(name: str, params: Params) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    method = build_method(student_block(name, params), params, ALONE.device)
    return method.trained["critic"].state_dict()


@pytest.mark.parametrize("gan", [0.0, 0.01])
def test_a_student_goes_on_with_the_critic_that_another_saved(gan: float, toy: Params) -> None:
    """Fake score and, where it had one, discriminator; the discriminator is new where not."""
    params = toy_params(**CONTINUED, students__dmd2_1__settings__gan_critic_weight=gan)
    train("dmd2-1", params, ALONE)
    saved, _ = read_safetensors(SNAPSHOTS / "dmd2-1" / "critic.safetensors")
    alone = toy_params(**{**CONTINUED, "students__dmd2_4__settings__continue_critic": False})
    goes_on, begins = critic_weights("dmd2-4", params), critic_weights("dmd2-4", alone)
    same = {name for name in goes_on if torch.equal(goes_on[name], begins[name])}
    assert all(torch.equal(goes_on[name], saved[name]) for name in saved)
    assert any(name.startswith("discriminator") for name in saved) is bool(gan)
    assert {name for name in goes_on if name not in saved} <= same
    assert any(name.startswith("fake_score") for name in goes_on.keys() - same)
    if gan:
        without = toy_params(
            **CONTINUED,
            students__dmd2_4__settings__gan_critic_weight=0.0,
            students__dmd2_4__settings__gan_student_weight=0.0,
        )
        assert critic_weights("dmd2-4", without).keys() < saved.keys(), "one not wanted is left"


def test_a_critic_is_saved_only_when_asked_and_is_part_of_what_the_model_is(toy: Params) -> None:
    """So what depends on the model depends on its critic, and a state of another is refused."""
    short = {"students__dmd2_1__kimg": 0.064}
    train("dmd2-1", toy_params(**short), ALONE)
    weights, about = read_safetensors(MODELS / "dmd2-1" / "model.safetensors")
    assert "critic_sha256" not in about and not list((SNAPSHOTS / "dmd2-1").iterdir())
    params, dataset = toy_params(**CONTINUED), ImageDataset(DATA)
    before = fingerprint("dmd2-4", params, dataset).digest
    train("dmd2-1", params, ALONE)
    same, about = read_safetensors(MODELS / "dmd2-1" / "model.safetensors")
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert len(about["critic_sha256"]) == 64
    assert fingerprint("dmd2-4", params, dataset).digest != before


def test_a_critic_that_is_missing_or_not_the_students_own_is_refused(toy: Params) -> None:
    params = toy_params(**CONTINUED)
    train("dmd2-1", params, ALONE)
    file = SNAPSHOTS / "dmd2-1" / "critic.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"saved with dmd2-1, got another .*1\.settings\.save_crit"
    ):
        train("dmd2-4", params, ALONE)
    file.unlink()
    with pytest.raises(ValueError, match="need a safetensors file at .*dmd2-1/critic.safetensors"):
        train("dmd2-4", params, ALONE)


def test_a_second_trainer_is_refused(toy: Params) -> None:
    SCRATCH.mkdir(exist_ok=True)
    with (
        FileLock(SCRATCH / "cd.lock"),
        pytest.raises(ValueError, match=r"another process trains cd here \(scratch/cd.lock\)"),
    ):
        train("cd", toy, ALONE)


def poison(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Make the loss of Consistency NaN for the images from 64 to `last`."""
    loss = Consistency.loss

    def poisoned(self: Consistency, phase: str, batch: Any, prepared: Any) -> Any:  # noqa: ANN401
        value, logs = loss(self, phase, batch, prepared)
        return (value * float("nan"), logs) if 64 <= batch.step_nimg <= last else (value, logs)

    monkeypatch.setattr(Consistency, "loss", poisoned)


def test_gradients_that_are_not_finite_are_left_out_and_logged(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, last=128)
    train("cd", toy, ALONE)
    rows = Log(MODELS / "cd" / "log.jsonl").rows()
    assert [row for row in rows if "nonfinite" in row] == [
        {"nimg": nimg, "nonfinite": "student", "norm": "nan", "loss": "nan"}
        for nimg in (64, 96, 128)
    ]
    assert rows[-1]["nonfinite_gradients"] == 3
    weights, _ = read_safetensors(MODELS / "cd" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_training_that_mends_its_gradients_goes_on_and_logs_them(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, last=128)
    train("cd", toy, ALONE)
    left_out, _ = read_safetensors(MODELS / "cd" / "model.safetensors")
    train("cd", toy_params(students__cd__nonfinite_to=1e5), ALONE)
    mended, _ = read_safetensors(MODELS / "cd" / "model.safetensors")
    rows = Log(MODELS / "cd" / "log.jsonl").rows()
    assert [row["nimg"] for row in rows if "nonfinite" in row] == [64, 96, 128]
    assert all(weight.isfinite().all() for weight in mended.values())
    assert any(not torch.equal(mended[k], left_out[k]) for k in mended), "Adam's moments moved it"


def test_the_other_order_of_the_data_is_whole_unrelated_and_the_same_on_every_rank(
    toy: Params,
) -> None:
    dataset, block = ImageDataset(DATA, toy.data.classes), toy.students["cd"]

    def epoch(rank: Rank) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        here, there, orders = [], [], []
        feed = Feed(dataset, block.batch, block.batch_gpu, 10**6, toy.seed, rank, 1)
        for nimg in range(0, len(dataset), block.batch):
            for batch in feed(nimg):
                here.append(batch.images)
                there.append(batch.other_images()[0])
                orders += batch.other_images()
        return torch.cat(here)[: len(dataset)], torch.cat(there)[: len(dataset)], orders

    here, there, orders = epoch(ALONE)
    assert torch.equal(here.flatten(1).sort(dim=0)[0], there.flatten(1).sort(dim=0)[0])
    assert int((here == there).flatten(1).all(dim=1).sum()) < 6, "about 1 of 200 meets itself"
    rounds = [order for i, order in enumerate(orders) if i // 2 % 2]  # of two in a batch, one
    assert all(map(torch.equal, epoch(Rank(1, 2, ALONE.device))[2], rounds))


def test_too_many_such_gradients_stop_the_training_and_keep_its_state(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = toy_params(students__cd__max_nonfinite=3, students__cd__checkpoint_kimg=0.064)
    poison(monkeypatch, last=512)
    with pytest.raises(FloatingPointError, match="student gradient is nan at nimg 128"):
        train("cd", params, ALONE)
    assert list(SCRATCH.glob("cd-*/state-000000000064.safetensors"))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=SLOW)])
def test_precision_is_honoured_by_student_teacher_and_critic(
    precision: str, toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = toy_params(precision=precision, students__dmd2_1__kimg=0.032)
    seen: dict[int, set[torch.dtype]] = {}
    forward = Denoiser.forward

    def watched(self: Denoiser, *inputs: torch.Tensor) -> torch.Tensor:
        hook = self.model.register_forward_pre_hook(
            lambda _, args: seen.setdefault(id(self), set()).add(args[0].dtype)
        )
        D_x = forward(self, *inputs)
        hook.remove()
        assert D_x.dtype == torch.float32
        return D_x

    monkeypatch.setattr(Denoiser, "forward", watched)
    train("dmd2-1", params, ALONE)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert len(seen) >= 3, "student, teacher and fake score"
    assert set.union(*seen.values()) == {wanted}


@SLOW
def test_fp16_scales_its_loss_and_the_state_knows_the_scale(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = toy_params(precision="fp16", students__cd__kimg=0.128)
    run = Run("cd", params.students["cd"], params, ALONE, ImageDataset(DATA))
    run.resume()
    scaler = run.updates["student"].scaler
    assert scaler.get_scale() == 65536
    run.iterate()
    scaler.update(1024.0)
    run.save_state()
    run.checkpoints.wait()
    again = Run("cd", params.students["cd"], params, ALONE, ImageDataset(DATA))
    again.resume()
    assert again.updates["student"].scaler.state_dict() == scaler.state_dict()
    assert again.updates["student"].scaler.get_scale() == 1024


def test_validation_is_logged_and_keeps_the_best(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([5.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(
        "fewstep.training.validation.frechet_distance", lambda *_: next(scores, 9.0)
    )
    without = {k: v for k, v in VALIDATION.items() if k != "teacher"}
    params = toy_params(students__cd__validation=without, students__cd__keep_checkpoints=1)
    remove = []
    monkeypatch.setattr(
        "fewstep.training.checkpoint.Checkpoints.finish",
        lambda self: (self.wait(), remove.extend(file.name for file in self.files())),
    )
    train("cd", params, ALONE)
    kept = [f"state-{nimg:012d}.safetensors" for nimg in (256, 512)]
    assert remove == kept, "the best beside the newest"
    rows = Log(MODELS / "cd" / "log.jsonl").rows()
    found = {r["nimg"]: r["validation/FD-EffLite0"] for r in rows if "validation/FD-EffLite0" in r}
    assert found == {128: 5.0, 256: 2.0, 384: 4.0, 512: 3.0}
    best, about = read_safetensors(MODELS / "cd@best" / "model.safetensors")
    last, of_last = read_safetensors(MODELS / "cd" / "model.safetensors")
    assert about == read_json(MODELS / "cd@best" / "model.json")
    assert about == {**of_last, "name": "cd@best", "kimg": 0.256}
    assert about["best"] == {"nimg": 256, "value": 2.0}
    kept = sorted(file.name for file in (SNAPSHOTS / "cd").iterdir())
    assert kept == [f"samples-{nimg:012d}.png" for nimg in found]
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_the_teachers_score_comes_first(toy: Params) -> None:
    train("cd", toy_params(students__cd__validation=VALIDATION, students__cd__kimg=0.064), ALONE)
    first, *rest = Log(MODELS / "cd" / "log.jsonl").rows()
    assert first["nimg"] == 0 and first["validation/teacher_FD-EffLite0"] > 0
    assert not any("validation/teacher_FD-EffLite0" in row for row in rest)
    signs = {"recall", "brightness", "std_ratio"}
    assert {f"validation/teacher_{sign}" for sign in signs} < first.keys()
    (own,) = [{k[11:] for k in row} for row in rest if "validation/FD-EffLite0" in row]
    assert own - {"", "FD-EffLite0"} == signs | {"real_brightness"}


def test_three_worsenings_are_a_warning_also_when_the_training_was_resumed(
    toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter([2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("fewstep.training.validation.frechet_distance", lambda *_: next(scores))
    without = {k: v for k, v in VALIDATION.items() if k != "teacher"}
    edits = {"validation": without, "checkpoint_kimg": 0.128}
    params = toy_params(**{f"students__cd__{key}": value for key, value in edits.items()})
    interrupted("cd", params, 256, monkeypatch)
    train("cd", params, ALONE)
    out = capsys.readouterr().out
    assert "resuming at 0.3 kimg" in out
    assert [line for line in out.splitlines() if "worsened" in line] == [
        "cd: validation has worsened three times in a row since 0.128 kimg, where it was 2; a row "
        "may draw the model of that time as model: cd@best"
    ]


def test_an_imported_network_is_a_place_to_start_from(toy: Params) -> None:
    (MODELS / "teacher").rename(MODELS / "theirs")
    teacher = build_method(student_block("teacher", toy), toy, ALONE.device)
    weights = {name: w + 1 for name, w in teacher.student.state_dict().items()}
    save_model(MODELS / "teacher", weights, {"name": "teacher"})
    imports = {"theirs": {"url": "x.safetensors", "sha256": "0" * 64}}
    params = toy_params(imports=imports, students__cd__init_from="theirs")
    method = build_method(student_block("cd", params), params, ALONE.device)
    theirs, _ = read_safetensors(MODELS / "theirs" / "model.safetensors")
    for name, weight in method.student.state_dict().items():
        assert torch.equal(weight, theirs[name])


def test_a_teacher_of_another_shape_is_refused_not_replaced(toy: Params) -> None:
    wider = tiny_params(Path(), data__source="toy.npz", network__model_channels=32)
    with pytest.raises(ValueError, match=r"does not fit the network: \d+ differences.*network"):
        train("cd", wider, ALONE)


def test_data_of_another_resolution_are_refused(toy: Params) -> None:
    other = tiny_params(Path(), data__resolution=32, network__attn_resolutions=[16])
    with pytest.raises(ValueError, match=r"data\.resolution"):
        train("cd", other, ALONE)


def test_an_unknown_student_is_named_with_the_known_ones(toy: Params) -> None:
    with pytest.raises(ValueError, match="need a student of cd, dmd2-1, dmd2-4, mm-2, got 'ddim'"):
        train("ddim", toy, ALONE)


# --- the first minutes ---------------------------------------------------------------------------


class Listening(Watcher):
    """Keeps the nimg of each row and the texts beside the progress."""

    def __init__(self) -> None:
        self.rows, self.texts = list[int](), list[str]()

    def write(self, row: Row, times: Row | None = None) -> None:
        self.rows.append(row["nimg"])

    def advance(self, images: int, text: str) -> None:
        self.texts.append(text)


def quiet(**tracking: Any) -> Params:  # noqa: ANN401
    """A training of 16 iterations of 32 images with two rows and no validation."""
    params = toy_params(students__cd__validation=None, students__cd__phema=None)
    return replace(params, tracking=replace(params.tracking, log_rows=2, **tracking))


def test_a_row_near_the_start_comes_at_the_time_in_params(toy: Params) -> None:
    for first, expected in ((None, []), (0.04, [64])):  # the first batch's end at or after it
        heard, params = Listening(), quiet(first_row_kimg=first)
        total = round(params.students["cd"].kimg * 1000)
        loop.train("cd", params, ALONE, heard)
        assert heard.rows == [*expected, total // 2, total]
        shutil.rmtree(SCRATCH)


def test_a_loss_is_shown_after_ten_seconds_without_a_row(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "here", lambda clock: 10.0 * (len(heard.texts) > 1))
    heard = Listening()
    loop.train("cd", quiet(), ALONE, heard)
    assert [bool(text) for text in heard.texts[:5]] == [False, False, True, False, False]
    assert heard.texts[2].startswith("loss ")


def test_the_average_is_computed_as_the_student_is(
    toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is scored: uncompiled, every validation would take longer than it needs."""
    seen: list[object] = []
    monkeypatch.setattr(loop, "accelerate", lambda network, how: seen.append((network, how)))
    params = quiet()
    run = Run("cd", params.students["cd"], params, ALONE, ImageDataset(DATA, 10))
    assert seen == [(run.averages.networks["average"], params.performance)]
