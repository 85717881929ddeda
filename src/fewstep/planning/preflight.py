"""Checks of what can go wrong in a long training, made beforehand on all processes at once.

Processes agree after each check. If one fails, all of them stop with its number and its reason, so
that none is left waiting in a collective for one that is gone.
"""

import gc
import netrc
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank
from fewstep.files import sha256_file
from fewstep.method import student_block
from fewstep.networks.denoiser import PRECISIONS
from fewstep.networks.weights import read_safetensors
from fewstep.params import Params, Student
from fewstep.paths import DATA, MODELS, SCRATCH
from fewstep.planning.links import refused_by_dvc
from fewstep.planning.plan import GB, plan_student
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.feed import check_world
from fewstep.training.fingerprint import Fingerprint
from fewstep.training.loop import Run
from fewstep.training.stopwatch import peak_memory

PATIENCE = timedelta(minutes=5)  # for the slowest process to arrive, and for an all-reduce
COMPILATION = timedelta(minutes=30)  # for a check, of which a trial step may compile all kernels
BYTES = 1 << 26  # to all-reduce


def preflight(name: str, params: Params, rank: Rank, thorough: bool = False) -> None:
    """Check processes, disk, data, models, W&B and all-reduce, and try one step of that student.

    Args:
        thorough: read all data, and try the step in every precision.

    Raises:
        ValueError: a check failed. All processes raise it, with the reason of the first to fail.
    """
    block = student_block(name, params)
    group = _arrive(rank)
    checks: dict[str, Callable[[], str]] = {
        "processes": lambda: check_processes(name, block, rank),
        "data": lambda: check_data(params, rank, thorough),
        "models": lambda: check_models(name, block, params),
        "disk": lambda: check_disk(name, block, params, rank),  # data and models name its states
        "wandb": lambda: check_wandb(params),
        "all-reduce": lambda: check_all_reduce(rank),
    }
    if rank.world > 1 and params.performance.compile != "none":
        checks["compile"] = lambda: trial_step_first(name, params, rank)
    checks[params.precision] = lambda: dry_run(name, params, rank)
    if thorough:  # under DVC no stage starts with such a link
        checks = {"links": lambda: "; ".join(refused_by_dvc()) or "none to another disk", **checks}
    for what, check in checks.items():
        agree(what, check, rank, group)
    if thorough:
        same = {params.precision, *(["tf32"] if rank.device.type == "cpu" else [])}
        for precision in [p for p in PRECISIONS if p not in same]:
            free_memory(rank.device)  # also of one that failed
            other = replace(params, precision=precision)
            with suppress(ValueError):  # printed only: this training does not need it
                agree(precision, lambda other=other: dry_run(name, other, rank), rank, group)
    if group is not None:  # its connections would stay open for the whole training
        dist.destroy_process_group(group)
    free_memory(rank.device)


def _arrive(rank: Rank) -> dist.ProcessGroup | None:
    """A group in which processes exchange results through the CPU, even if NCCL is broken.

    Raises:
        ValueError: some processes do not arrive.
    """
    if rank.world == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=COMPILATION)
    assert isinstance(group, dist.ProcessGroup), "all processes are members"
    try:
        dist.monitored_barrier(group, timeout=PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise ValueError(f"need all {rank.world} processes, got: {error}") from error
    return group


def agree(
    what: str, check: Callable[[], str], rank: Rank, group: dist.ProcessGroup | None = None
) -> None:
    """Run a check on this and every other process, and return only if all pass.

    Args:
        check: returns what it found, for the line that the first process prints. After failing, it
            must not enter a collective.

    Raises:
        ValueError: a check failed here or elsewhere; names the first one's process, machine and
            reason.
    """
    try:
        mine = (True, check())
    except Exception as error:  # of any kind: the others must hear of it
        reason = " ".join(str(error).split()) or type(error).__name__
        mine = (False, f"process {rank.index} on {socket.gethostname()}: {reason}")
    answers = [mine] * rank.world
    if group is not None:
        dist.all_gather_object(answers, mine, group=group)
    failed = [text for passed, text in answers if not passed]
    if rank.first:
        print(f"preflight: {what}: {failed[0] if failed else answers[0][1]}", flush=True)
    if failed:
        more = f" ({len(failed)} of {rank.world} processes)" if len(failed) > 1 else ""
        raise ValueError(f"{what}: {failed[0]}{more}")


def check_processes(name: str, block: Student, rank: Rank) -> str:
    each = check_world(name, block, rank.world)
    return f"{rank.world} x {rank.device.type}, {each} micro-batches of {block.batch_gpu} each"


def check_disk(name: str, block: Student, params: Params, rank: Rank) -> str:
    """There is room for what this training will add to its states, for its snapshots and model.

    `scratch` and `artifacts` may be on different disks.
    """
    if not rank.first:
        return ""
    planned = plan_student(name, block, params, rank.world)
    held = held_already(name, block, params)
    needs = {SCRATCH: max(planned.disk_while - held, 0.0), MODELS: planned.disk_after}
    disks: dict[int, tuple[Path, float]] = {}
    for place, need in needs.items():
        there = next(path for path in (place, *place.parents) if path.exists())
        path, before = disks.get(there.stat().st_dev, (there, 0.0))
        disks[there.stat().st_dev] = path, before + need
    said = []
    for path, need in disks.values():
        free = shutil.disk_usage(path).free
        if need > free:
            raise ValueError(
                f"need {need / GB:.1f} GB beside {held / GB:.1f} GB of its states, got "
                f"{free / GB:.1f} free at {path} (params.yaml: students.{name}."
                "phema.snapshot_kimg, keep_checkpoints)"
            )
        said.append(f"{need / GB:.1f} of {free / GB:.1f} GB free")
    return ", ".join(said) + (f", {held / GB:.1f} GB held already" if held else "")


def held_already(name: str, block: Student, params: Params) -> int:
    """Bytes of the states and snapshots from which this very training would continue."""
    dataset = ImageDataset(DATA, params.data.classes)
    fingerprint = Fingerprint.of(name, block, params, dataset)
    folder = Checkpoints(name, fingerprint, block.keep_checkpoints).folder
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_data(params: Params, rank: Rank, thorough: bool) -> str:
    """The LMDB fits the params; if `thorough`, its content matches its sha256."""
    d, dataset = params.data, ImageDataset(DATA, params.data.classes)
    dataset.check(d.resolution, d.channels, d.classes)
    if thorough and rank.first:
        dataset.verify()
    return f"{len(dataset)} images, sha256 {dataset.content_sha256()[:12]}"


def check_models(name: str, block: Student, params: Params) -> str:
    """The teacher is the one that the params name, and all models that are needed are readable."""
    if name == "teacher":
        return "none needed"
    wanted = {"teacher", block.init_from or "teacher"}
    files = {model: MODELS / model / "model.safetensors" for model in sorted(wanted)}
    shas = {model: sha256_file(file) for model, file in files.items() if file.exists()}
    if gone := [model for model in files if model not in shas]:
        raise ValueError(f"need the finished model {gone[0]}, got nothing at {files[gone[0]]}")
    about = read_safetensors(files["teacher"])[1]
    named = params.teacher.sha256
    if named and about.get("sha256", named) != named:
        raise ValueError(
            f"need the teacher with sha256 {named}, got {about['sha256']} in {files['teacher']}; "
            "run fewstep download-teacher (params.yaml: teacher.sha256)"
        )
    return ", ".join(f"{model} {sha256[:12]}" for model, sha256 in shas.items())


def check_wandb(params: Params) -> str:
    """If W&B is to be used online, there is a key."""
    mode = params.tracking.wandb.mode
    if mode == "disabled":
        return mode
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _logged_in()):
        raise ValueError(
            "need a key of W&B: WANDB_API_KEY, or `wandb login` (params.yaml: tracking.wandb.mode; "
            "offline needs none)"
        )
    return mode


def _logged_in() -> bool:
    """Whether `wandb login` left a key."""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False


def check_all_reduce(rank: Rank) -> str:
    """The devices can sum over processes; with NCCL, a broken network shows here.

    Raises:
        ValueError: the sum is wrong.
        RuntimeError: it took too long.
    """
    if rank.world == 1:
        return "alone"
    group: Any = dist.new_group(timeout=PATIENCE)
    _summed(rank, group)  # the first one sets up NCCL's connections, which takes seconds
    got, seconds = _summed(rank, group)
    dist.destroy_process_group(group)
    if got != {expected := rank.world * (rank.world + 1) / 2}:
        raise ValueError(f"need a sum of {expected}, got {got}")
    return f"{BYTES / GB / seconds:.2f} GB/s over {dist.get_backend()}"


def _summed(rank: Rank, group: Any) -> tuple[set[float], float]:  # noqa: ANN401
    """Different values in the sum of all ranks' numbers plus 1, and the seconds that it took."""
    values = torch.full((BYTES // 4,), float(rank.index + 1), device=rank.device)
    started = time.perf_counter()
    dist.all_reduce(values, group=group)
    return {float(values[0]), float(values[-1])}, time.perf_counter() - started


def dry_run(name: str, params: Params, rank: Rank) -> str:
    """Train on one micro-batch in each phase, each process on its own; writes nothing.

    Raises:
        FloatingPointError: a loss is not finite.
        RuntimeError: for example, memory is too small.
    """
    block = student_block(name, params)
    block = replace(block, batch=block.batch_gpu, validation=None)
    alone = Rank(0, 1, rank.device)
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rank.device)
    started = time.perf_counter()
    run = Run(name, block, params, alone, ImageDataset(DATA, params.data.classes))
    batches, prepared = run.feed(0), list[Any]()
    for phase in run.method.trained:
        run.update(phase, batches, prepared)
    run.averages.update(0)
    for phase, _, _, loss in run.nonfinite.unseen:
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss of the {phase} is {float(loss)} in {params.precision} "
                "(params.yaml: precision)"
            )
    seconds, peak = time.perf_counter() - started, peak_memory(rank.device)
    run.feed.thread.shutdown(cancel_futures=True)  # it reads ahead
    return f"a step of {block.batch_gpu} images, {seconds:.1f} s, {peak / GB:.1f} GB"


def trial_step_first(name: str, params: Params, rank: Rank) -> str:
    """A trial step of one process of each node; the others will find its kernels on the disk.

    Eight that compile the same kernels at once take far longer than one.
    """
    if rank.local:
        return ""
    said = dry_run(name, params, rank)
    free_memory(rank.device)
    return said


def free_memory(device: torch.device) -> None:
    """Leave the training all memory that a dry run used, and let its peak be that of itself."""
    gc.collect()  # networks, closures and threads refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
