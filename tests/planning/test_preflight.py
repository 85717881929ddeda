"""Preflight: what it lets pass, what it refuses, and that no process is left waiting."""

import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lmdb
import pytest
import torch
import torch.distributed as dist

from experiment import set_up
from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.networks.weights import read_safetensors, save_model
from fewstep.params import Params, Performance, Teacher
from fewstep.paths import DATA, MODELS
from fewstep.planning import preflight as checks
from fewstep.planning.plan import plan_student
from fewstep.planning.preflight import (
    agree,
    check_all_reduce,
    check_processes,
    dry_run,
    free_memory,
    preflight,
)
from fewstep.training.loop import Run
from places import ROOT

ALONE = Rank(0, 1, torch.device("cpu"))
SRC = ROOT / "src"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return set_up(tmp_path, monkeypatch, images=16)


def files() -> set[Path]:
    return {path for path in Path().rglob("*") if path.is_file()}


def changed(params: Params, name: str, **changes: object) -> Params:
    block = replace(params.students[name], **changes)
    return replace(params, students=MappingProxyType({**params.students, name: block}))


@pytest.mark.parametrize("name", ["cd", pytest.param("dmd2-1", marks=pytest.mark.slow)])
def test_a_sound_training_passes_and_nothing_is_written(
    name: str, toy: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    preflight(name, toy, ALONE, thorough=True)
    assert files() == before
    said = re.findall(r"^preflight: ([\w-]+): ", capsys.readouterr().out, re.MULTILINE)
    expected = ["links", "processes", "data", "models", "disk", "wandb", "all-reduce"]
    assert said == [*expected, "fp32", "bf16", "fp16"]


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(toy: Params) -> None:
    block = changed(toy, "cd", batch=12, batch_gpu=4).students["cd"]
    second = Rank(1, 2, ALONE.device)
    with pytest.raises(ValueError, match=r"process 1 .* batch / batch_gpu = 3, got 2; 1, 3 would"):
        agree("processes", lambda: check_processes("cd", block, second), second)


def test_a_disk_that_is_too_small_is_refused(toy: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")(100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"^disk: .*keep_checkpoints"):
        preflight("cd", toy, ALONE)


def test_states_that_the_training_holds_already_need_no_room(
    toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was refused when it was to go on after most of its disk was used, by itself."""
    params = changed(toy, "cd", kimg=0.064, checkpoint_kimg=0.016, validation=None)
    block = params.students["cd"]
    run = Run("cd", block, params, ALONE, ImageDataset(DATA, 10))
    for nimg in (16, 32):
        run.nimg = nimg
        run.save_state()
    run.checkpoints.wait()
    held = sum(file.stat().st_size for file in run.checkpoints.folder.iterdir())
    planned = plan_student("cd", block, params, 1)
    usage = namedtuple("usage", "free")(planned.disk_while + planned.disk_after - held / 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    preflight("cd", params, ALONE)
    assert "GB held already" in capsys.readouterr().out
    other = replace(params, seed=params.seed + 1)  # another training holds nothing
    with pytest.raises(ValueError, match=r"^disk: .*need .* GB beside 0.0 GB of its states"):
        preflight("cd", other, ALONE)


def test_each_disk_needs_room_of_its_own(toy: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    big = Path("big").absolute()
    big.mkdir()
    Path("scratch").symlink_to(big)
    real = Path.stat

    def stat(path: Path, **kwargs: bool) -> os.stat_result:
        found = real(path, **kwargs)
        elsewhere = os.path.realpath(path).startswith(str(big))
        return os.stat_result((*found[:2], found.st_dev + elsewhere, *found[3:]))

    monkeypatch.setattr(Path, "stat", stat)
    room = {"scratch": 10**12, MODELS.name: 100_000}
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(room[Path(path).name]))
    with pytest.raises(ValueError, match=r"^disk: .* free at artifacts/models"):
        preflight("cd", toy, ALONE)
    room.update({"scratch": 100_000, MODELS.name: 10**12})
    with pytest.raises(ValueError, match=r"^disk: .* free at scratch"):
        preflight("cd", toy, ALONE)


@pytest.mark.parametrize("name", ["cd", pytest.param("dmd2-4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_dry_run_lives_on(
    name: str, fails: bool, toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its networks would take their memory a second time while the real ones train."""
    if name == "dmd2-4":
        toy = changed(toy, name, init_from="teacher")
    made: list[weakref.ref[Any]] = []

    class Noted(Run):
        def __init__(self, *args: Any) -> None:  # noqa: ANN401
            super().__init__(*args)
            made.append(weakref.ref(self))
            modules = {**self.modules(), **self.method.frozen}.values()
            made.extend(weakref.ref(p) for module in modules for p in module.parameters())
            made.append(weakref.ref(self.feed))

        def update(self, phase: str, batches: list[Any], prepared: list[Any]) -> None:
            super().update(phase, batches, prepared)
            if fails:
                raise RuntimeError("out of memory")

    monkeypatch.setattr("fewstep.planning.preflight.Run", Noted)
    before = threading.active_count()
    gc.disable()  # so that only what preflight does itself counts
    try:
        with suppress(ValueError):
            preflight(name, toy, ALONE)
        if fails:
            free_memory(ALONE.device)
        alive = [ref() for ref in made if ref() is not None]
    finally:
        gc.enable()
    assert len(made) > 50 and alive == []
    assert threading.active_count() == before


def test_data_that_changed_are_found_by_the_command_alone(toy: Params) -> None:
    with lmdb.open(str(DATA), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.put(b"images_5_data", bytes(256))
    preflight("cd", toy, ALONE)
    with pytest.raises(ValueError, match="^data: .*need content with sha256"):
        preflight("cd", toy, ALONE, thorough=True)


def test_another_teacher_than_the_params_name_is_refused(toy: Params) -> None:
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    save_model(MODELS / "teacher", weights, {**about, "sha256": "1" * 64})
    params = replace(toy, teacher=Teacher("https://example.org/t.pkl", "0" * 64))
    with pytest.raises(ValueError, match=r"^models: .*got 1{64}.*download-teacher"):
        preflight("cd", params, ALONE)


def test_a_student_that_is_not_finished_is_named(toy: Params) -> None:
    params = changed(toy, "dmd2-4", init_from="dmd2-1")
    with pytest.raises(ValueError, match="need the finished model dmd2-1, got nothing at"):
        preflight("dmd2-4", params, ALONE)


def test_wandb_needs_a_key_online(toy: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = replace(toy.tracking.wandb, mode="online")
    params = replace(toy, tracking=replace(toy.tracking, wandb=wandb))
    with pytest.raises(ValueError, match="^wandb: .*need a key of W&B: WANDB_API_KEY"):
        preflight("cd", params, ALONE)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    preflight("cd", params, ALONE)


def test_a_step_that_is_not_finite_is_refused(toy: Params) -> None:
    weights, about = read_safetensors(MODELS / "teacher" / "model.safetensors")
    weights["model.out_conv.bias"].fill_(float("nan"))
    save_model(MODELS / "teacher", weights, about)
    with pytest.raises(FloatingPointError, match=r"the loss of the student is nan in fp32"):
        dry_run("cd", toy, ALONE)


def test_precisions_that_fail_are_said_but_stop_nothing(
    toy: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, params: Params, rank: Rank) -> str:
        if params.precision == "fp16":
            raise RuntimeError("no fp16 here")
        return "fine"

    monkeypatch.setattr("fewstep.planning.preflight.dry_run", fail)
    preflight("cd", toy, ALONE, thorough=True)
    assert "fp16: process 0 on" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no fp16 here"):
        preflight("cd", replace(toy, precision="fp16"), ALONE)


def test_the_all_reduce_that_is_timed_is_not_the_first_and_leaves_no_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one sets up NCCL's connections."""
    called: list[str] = []

    def reduce(values: torch.Tensor, group: str) -> None:
        called.append("reduce")
        time.sleep(0.5 * (called.count("reduce") == 1))
        values += 2

    monkeypatch.setattr(dist, "new_group", lambda timeout: called.append("new") or "group")
    monkeypatch.setattr(dist, "all_reduce", reduce)
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: called.append(f"end {group}"))
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    said = check_all_reduce(Rank(0, 2, ALONE.device))
    assert called == ["new", "reduce", "reduce", "end group"]
    assert said.endswith("GB/s over nccl") and float(said.split()[0]) > 0.15, (
        "64 MiB in 0.5 s: 0.13"
    )


@pytest.mark.parametrize("local", [0, 1])
def test_one_process_of_a_node_compiles_before_the_others(
    local: int, toy: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(checks, "_arrive", lambda rank: None)
    monkeypatch.setattr(checks, "check_all_reduce", lambda rank: "")
    monkeypatch.setattr(checks, "dry_run", lambda *_: order.append("step") or "")
    monkeypatch.setattr(checks, "agree", lambda what, check, *_: order.append(what) or check())
    compiled = replace(toy, performance=Performance(compile="blocks"))
    preflight("cd", compiled, Rank(local, 2, ALONE.device, local))
    assert order[-4 + local :] == ["compile", *["step"] * (1 - local), "fp32", "step"]
    order.clear()
    preflight("cd", toy, Rank(local, 2, ALONE.device, local))
    assert "compile" not in order


# --- several processes ---------------------------------------------------------------------------

ONE_FAILS = """
import sys
from fewstep import distributed
from fewstep.planning.preflight import _arrive, agree
def check():
    if rank.index == 1:
        raise RuntimeError("the second GPU is on fire")
    return "fine"
with distributed.joined("cpu") as rank:
    group = _arrive(rank)
    agree("first", lambda: "fine", rank, group)
    try:
        agree("second", check, rank, group)
    except ValueError as error:
        print(f"[{rank.index}] {error}", flush=True)
"""
ONE_IS_GONE = """
import sys
from datetime import timedelta
from fewstep import distributed
from fewstep.planning import preflight
preflight.PATIENCE = timedelta(seconds=6)
with distributed.joined("cpu") as rank:
    if rank.index == 1:
        import os, time
        time.sleep(9)
        os._exit(3)
    try:
        preflight._arrive(rank)
    except (ValueError, RuntimeError) as error:
        print(f"[{rank.index}] {error}", flush=True)
"""


def torchrun(script: str, ranks: int = 2) -> tuple[str, float]:
    """Output and seconds of a script in several processes, each left alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, processes = time.monotonic(), []
    for rank in range(ranks):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **where, **place, "PYTHONPATH": str(SRC)}
        command = [sys.executable, "-c", script]
        pipe = subprocess.PIPE
        run = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        processes.append(run)
    output = "".join(process.communicate(timeout=100)[0] for process in processes)
    return output, time.monotonic() - started


@pytest.mark.slow  # processes that import torch
def test_all_processes_stop_with_the_reason_of_the_one_that_failed() -> None:
    output, _ = torchrun(ONE_FAILS)
    for rank in (0, 1):
        assert f"[{rank}] second: process 1 on" in output, output
    assert output.count("the second GPU is on fire") == 3, "the first one prints it, too"
    assert "preflight: first: fine" in output


@pytest.mark.slow
def test_a_process_that_never_comes_is_missed_instead_of_waited_for() -> None:
    output, seconds = torchrun(ONE_IS_GONE)
    assert "[0] " in output and seconds < 60, output
    assert re.search(r"need all 2 processes|[Tt]imed out|rank", output)


@pytest.mark.slow
def test_two_processes_pass_and_train(toy: Params) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for batch in ("batch: 16", "batch_gpu: 8"):
        key = batch.split(":")[0]
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(re.sub(rf"\b{key}: \d+", batch, text))
    run = subprocess.run(
        [*command, "--nproc-per-node=2", "-m", "fewstep", "preflight", "cd"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all-reduce: " in run.stdout and "over gloo" in run.stdout
    assert "2 x cpu, 1 micro-batches of 8 each" in run.stdout
