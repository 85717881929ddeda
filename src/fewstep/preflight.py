"""What can go wrong in a long training, tried before it: every check on every process at once.

Processes agree after each check. When one fails, all of them stop with its reason and its number,
and none is left waiting in a collective for one that is gone.
"""

import importlib.util
import netrc
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType

import torch
import torch.distributed as dist

from fewstep.data.lmdb import ImageDataset
from fewstep.denoiser import PRECISIONS
from fewstep.distributed import Rank
from fewstep.files import sha256_file
from fewstep.methods import student_block
from fewstep.models import MODELS, read_safetensors
from fewstep.params import Params, Student
from fewstep.plan import GB, plan_student
from fewstep.train import DATA, Run, check_world, peak_memory

PATIENCE = timedelta(minutes=5)  # for the slowest process to come to a check
BYTES = 1 << 26  # that the all-reduce moves


def preflight(name: str, params: Params, rank: Rank, thorough: bool = False) -> None:
    """Check processes, disk, data, teacher, W&B, all-reduce, and one step of that student.

    Args:
        thorough: read all data, and take the step in every precision.

    Raises:
        ValueError: a check failed; on all processes alike, with the reason of the first that did.
    """
    block = student_block(name, params)
    group = _arrive(rank)
    checks: dict[str, Callable[[], str]] = {
        "processes": lambda: check_processes(name, block, rank),
        "disk": lambda: check_disk(name, block, params, rank),
        "data": lambda: check_data(params, rank, thorough),
        "models": lambda: check_models(name, block, params),
        "wandb": lambda: check_wandb(params),
        "all-reduce": lambda: check_all_reduce(rank),
        params.precision: lambda: dry_run(name, params, rank),
    }
    for what, check in checks.items():
        agree(what, check, rank, group)
    if thorough:
        same = {params.precision, *(["tf32"] if rank.device.type == "cpu" else [])}
        for precision in [p for p in PRECISIONS if p not in same]:
            other = replace(params, precision=precision)
            with suppress(ValueError):  # said, but this training does without it
                agree(precision, lambda other=other: dry_run(name, other, rank), rank, group)


def _arrive(rank: Rank) -> dist.ProcessGroup | None:
    """A group of CPUs for what processes tell each other.

    Raises:
        ValueError: some do not come.
    """
    if rank.world == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup), "this process is in it"
    try:
        dist.monitored_barrier(group, timeout=PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise ValueError(f"need all {rank.world} processes, got: {error}") from error
    return group


def agree(
    what: str, check: Callable[[], str], rank: Rank, group: dist.ProcessGroup | None = None
) -> None:
    """Run a check here as on every process, and go on only if all passed.

    Args:
        check: gives what it found, for the line that the first process prints; takes part in no
            collective after it failed.

    Raises:
        ValueError: one failed, here or elsewhere: the first one's number, machine and reason.
    """
    try:
        mine = (True, check())
    except Exception as error:  # whatever it is, the others have to know
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
    """Room for states, snapshots and model, on the disk that all processes share."""
    if not rank.first:
        return ""
    planned = plan_student(name, block, params, rank.world)
    need, free = planned.disk_while + planned.disk_after, shutil.disk_usage(".").free
    if need > free:
        raise ValueError(
            f"need {need / GB:.1f} GB, got {free / GB:.1f} free (params.yaml: students.{name}."
            "phema.snapshot_kimg, keep_checkpoints)"
        )
    return f"{need / GB:.1f} of {free / GB:.1f} GB free"


def check_data(params: Params, rank: Rank, thorough: bool) -> str:
    """The LMDB fits the params; when `thorough`, its content is that of its sha256."""
    d, dataset = params.data, ImageDataset(DATA, params.data.classes)
    dataset.check(d.resolution, d.channels, d.classes)
    if thorough and rank.first:
        dataset.verify()
    return f"{len(dataset)} images, sha256 {dataset.content_sha256()[:12]}"


def check_models(name: str, block: Student, params: Params) -> str:
    """The teacher is the one that the params name, and all that is needed can be read."""
    if name == "teacher":
        return "none needed"
    wanted = {"teacher", block.init_from or "teacher"}
    files = {model: MODELS / model / "model.safetensors" for model in sorted(wanted)}
    shas = {model: sha256_file(file) for model, file in files.items() if file.exists()}
    if gone := [model for model in files if model not in shas]:
        raise ValueError(f"need the finished model {gone[0]}, got nothing at {files[gone[0]]}")
    about = read_safetensors(files["teacher"])[1]
    if (
        params.teacher.sha256
        and about.get("sha256", params.teacher.sha256) != params.teacher.sha256
    ):
        raise ValueError(
            f"need the teacher of sha256 {params.teacher.sha256}, got {about['sha256']} in "
            f"{files['teacher']}; run fewstep download-teacher (params.yaml: teacher.sha256)"
        )
    return ", ".join(f"{model} {sha256[:12]}" for model, sha256 in shas.items())


def check_wandb(params: Params) -> str:
    """What W&B needs, where it is wanted: the package, and online a key."""
    mode = params.tracking.wandb.mode
    if mode == "disabled":
        return mode
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("need wandb: pip install 'fewstep[wandb]' (params.yaml: tracking.wandb)")
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
    """The devices can add up; over NCCL this is where a broken network shows.

    Raises:
        ValueError: the sum is wrong.
        RuntimeError: it did not come in time.
    """
    if rank.world == 1:
        return "alone"
    group = dist.new_group(timeout=PATIENCE)
    values = torch.full((BYTES // 4,), float(rank.index + 1), device=rank.device)
    started = time.perf_counter()
    dist.all_reduce(values, group=group)
    expected, got = rank.world * (rank.world + 1) / 2, {float(values[0]), float(values[-1])}
    seconds = time.perf_counter() - started
    if got != {expected}:
        raise ValueError(f"need a sum of {expected}, got {got}")
    return f"{BYTES / GB / seconds:.2f} GB/s over {dist.get_backend()}"


def dry_run(name: str, params: Params, rank: Rank) -> str:
    """One micro-batch of each phase, by each process for itself; writes nothing.

    Raises:
        FloatingPointError: a loss is not finite.
        RuntimeError: the memory does not suffice, say.
    """
    block = student_block(name, params)
    block = replace(block, batch=block.batch_gpu, validation=None)
    if params.performance.shard and rank.world > 1:
        block = replace(block, phema=None)  # whole here, and more than a process will hold
    if name == "teacher":
        params = replace(params, teacher=replace(params.teacher, train=block))
    else:
        students = MappingProxyType({**params.students, name: block})
        params = replace(params, students=students)
    alone = Rank(0, 1, rank.device)
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rank.device)
    started = time.perf_counter()
    run = Run(name, block, params, alone, ImageDataset(DATA, params.data.classes))
    batches = list(run.micro_batches())
    for phase in run.method.phases(0):
        run.update(phase, batches)
    run.averages.update(0)
    for phase, _, _, loss in run.nonfinite.unseen:
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss of the {phase} is {float(loss)} in {params.precision} "
                "(params.yaml: precision)"
            )
    seconds, peak = time.perf_counter() - started, peak_memory(rank.device)
    del run, batches
    if rank.device.type == "cuda":
        torch.cuda.empty_cache()
    return f"a step of {block.batch_gpu} images, {seconds:.1f} s, {peak / GB:.1f} GB"
