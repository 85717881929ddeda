"""The one distributed launch, for DVC, Snakemake, srun, Kubernetes and a plain shell.

`fewstep train NAME` is the same command everywhere. It reads from the environment how many nodes
there are and which one this is, and becomes torchrun with one process per GPU. If Slurm allocated
several nodes but started a single task, it first becomes srun with one task per node.
"""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # a Snakemake profile counts GPUs with this module; torch would take 2 s
    from fewstep.distributed import Rank

# Variables with the number of nodes, this node's number, and where they meet, the most exact first
COUNT = ("PET_NNODES", "NNODES", "WORLD_SIZE")
INDEX = ("PET_NODE_RANK", "NODE_RANK", "RANK")
HOST, PORT = ("PET_MASTER_ADDR", "MASTER_ADDR"), ("PET_MASTER_PORT", "MASTER_PORT")
PATIENCE = 600  # seconds for workers to save their state; torchrun's default of 30 can be too few


@dataclass(frozen=True)
class Nodes:
    """This process's place: node `index` of `count` nodes, which meet at `endpoint`."""

    count: int
    index: int
    source: str  # where that information is from, for the printed line
    endpoint: str | None = None  # host:port; None on a single node
    job: str = "fewstep"  # the same on all nodes of a run, and different for each run
    spread: bool = False  # the only task in a job of several nodes: srun must start the others


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process as one of its workers."""
    return all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def launch(device: str) -> None:
    """Run this command line again on all nodes and GPUs of the environment; exit as it does.

    Returns if this process is all that is needed: torchrun would import torch once more, for 2 s.
    A CPU gets one process with all its cores: two with half of them are no faster.

    Raises:
        ValueError: the environment contradicts itself, or params ask for CUDA and there is none.
    """
    import torch

    from fewstep.distributed import pick_device

    nodes = find_nodes(os.environ)
    if nodes.spread:
        # one task per node that may use all its cores; by default Slurm binds a task to one
        shape = [f"--nodes={nodes.count}", f"--ntasks={nodes.count}", "--ntasks-per-node=1"]
        arguments = ["srun", *shape, "--cpu-bind=none"]
        print(f"launch: {nodes.count} nodes ({nodes.source}): {' '.join(arguments)}", flush=True)
        os.execvp("srun", [*arguments, sys.executable, "-m", "fewstep", *sys.argv[1:]])
    kind = pick_device(device).type
    count = torch.cuda.device_count() if kind == "cuda" else 1
    print(f"launch: {describe(nodes, count, kind)}", flush=True)
    if nodes.count == count == 1:
        return
    # torchrun's default of 1 would leave the other cores idle
    os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads() // count, 1)))
    run([*torchrun_arguments(nodes, count), "-m", "fewstep", *sys.argv[1:]])


@contextmanager
def ranks(device: str, if_several: bool = False) -> Generator["Rank"]:
    """This process's rank among the launched ones; launches them first if that is not done.

    Args:
        if_several: launch only if there are several GPUs to share the work, and on this node alone.
    """
    from fewstep.distributed import joined
    from fewstep.training.failures import ending_together

    if not launched() and (several_gpus(device) or not if_several):
        launch(device)
    with ending_together(), joined(device) as rank:
        yield rank


def find_nodes(environ: Mapping[str, str]) -> Nodes:
    """Read what says how many nodes there are: PET_NNODES, NNODES or WORLD_SIZE, else SLURM_*.

    torchrun's own PET_* come first: where Kubeflow's operator sets both, its WORLD_SIZE counts
    processes. If set, PET_MASTER_* and MASTER_* also override the meeting point derived from Slurm.

    Raises:
        ValueError: a variable is not what it should be, several nodes cannot meet, or a Slurm step
            has several tasks per node.
    """
    count = _number(environ, *COUNT) or 1
    if count > 1:
        return _declared(environ, count)
    if (number := _number(environ, "SLURM_JOB_ID")) is None:
        return Nodes(1, 0, "this machine")
    tasks, job = _number(environ, "SLURM_STEP_NUM_TASKS") or 1, str(number)
    if tasks > 1:
        return _slurm_step(environ, tasks, job)
    inside = "SLURM_STEP_ID" in environ  # somebody's srun asked for one task: respect it
    count = 1 if inside else _slurm_nodes(environ, job)
    return Nodes(count, 0, f"Slurm job {job}", job=job, spread=count > 1)


def _first(environ: Mapping[str, str], names: Sequence[str]) -> tuple[str, str | None]:
    """The first of these variables that is set, and its value; else the last one and None."""
    return next(((n, environ[n]) for n in names if n in environ), (names[-1], None))


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The number in the first of these variables that is set.

    Raises:
        ValueError: it holds something else, such as nothing.
    """
    name, text = _first(environ, names)
    if text is not None and not text.isdecimal():
        raise ValueError(f"need a number, got {text!r} (environment: {name}; or unset it)")
    return None if text is None else int(text)


def _needed(environ: Mapping[str, str], *names: str) -> int:
    """As `_number`, of a variable that must be there."""
    if (number := _number(environ, *names)) is None:
        raise ValueError(f"need a number, got nothing (environment: {names[-1]})")
    return number


def _declared(environ: Mapping[str, str], count: int) -> Nodes:
    """This node as Kubernetes' training jobs and shells describe it."""
    (source, host), (number, _) = _first(environ, HOST), _first(environ, INDEX)
    index = _number(environ, *INDEX)
    if not host or index is None:
        raise ValueError(
            f"need MASTER_ADDR and RANK (this node's number) with {count} nodes, got "
            f"MASTER_ADDR={host}, RANK={index} (environment: {source} and {number})"
        )
    if index >= count:
        raise ValueError(
            f"need this node's number below {count}, got {index} (environment: {number}; "
            f"{_first(environ, COUNT)[0]} counts nodes)"
        )
    return Nodes(count, index, source, f"{host}:{_number(environ, *PORT) or 29400}")


def _slurm_step(environ: Mapping[str, str], tasks: int, job: str) -> Nodes:
    count, step = _needed(environ, "SLURM_STEP_NUM_NODES"), environ.get("SLURM_STEP_ID", "0")
    if tasks != count:
        raise ValueError(
            f"need one task a node, since torchrun starts the rest, got {tasks} tasks on {count} "
            "nodes (srun --ntasks-per-node=1)"
        )
    host = _first(environ, HOST)[1] or first_host(environ.get("SLURM_STEP_NODELIST", ""))
    port = _number(environ, *PORT) or 20000 + int(job) % 10000
    attempt = environ.get("SLURM_RESTART_COUNT", "0")
    index, name = _needed(environ, "SLURM_NODEID"), f"{job}.{step}"
    return Nodes(count, index, f"Slurm step {name}", f"{host}:{port}", f"{name}.{attempt}")


def _slurm_nodes(environ: Mapping[str, str], job: str) -> int:
    """Number of nodes of the job; squeue knows it where Snakemake's Slurm plugin hides it."""
    if (count := _number(environ, "SLURM_JOB_NUM_NODES")) is not None:
        return count
    ask = ["squeue", "--noheader", f"--jobs={job}", "--format=%D"]
    try:
        return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise ValueError(
            f"need a number of nodes from squeue, got: {said} (environment: SLURM_JOB_ID={job}; "
            "set SLURM_JOB_NUM_NODES)"
        ) from error


def first_host(nodelist: str) -> str:
    """The first name in a Slurm node list: `gpu07` in `gpu[07-09,12],big1`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodelist)
    if match is None:
        raise ValueError(f"need a list of nodes, got {nodelist!r} (SLURM_STEP_NODELIST)")
    return "".join(part or "" for part in match.groups())


def torchrun_arguments(nodes: Nodes, count: int) -> list[str]:
    """torchrun with `count` processes on this node; c10d connects several nodes."""
    shape = [f"--nnodes={nodes.count}", f"--nproc-per-node={count}"]  # else PET_* would decide
    if nodes.endpoint is None:
        return ["--standalone", *shape]
    # torchrun guesses is_host by host name, but a node may not know the name that others use for it
    conf = f"--rdzv-conf=is_host={int(nodes.index == 0)}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={nodes.endpoint}", f"--rdzv-id={nodes.job}"]
    return [*shape, *meeting, conf]


def describe(nodes: Nodes, count: int, kind: str) -> str:
    """The launch in a line: `2 nodes x 8 cuda, this is node 1, meeting at n7:20012 (...)`."""
    if nodes.endpoint is None:
        return f"{count} x {kind} ({nodes.source})"
    where = f"this is node {nodes.index}, meeting at {nodes.endpoint}"
    return f"{nodes.count} nodes x {count} {kind}, {where} ({nodes.source})"


def run(arguments: list[str]) -> NoReturn:
    """Run torchrun in this process; forward signals to workers, exit as the first to fail did."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from fewstep.training.guards import heeded
    from fewstep.warned import left_to_workers

    # the failing worker prints its own error; torchrun would add a page about it
    logging.disable(logging.CRITICAL)
    left_to_workers()
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(kind.name for kind in heeded()))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    try:
        run.main(arguments)
    except ChildFailedError as error:
        code = next(iter(error.failures.values())).exitcode
        sys.exit(code if code >= 0 else 128 - code)
    except SignalException as error:
        for kind in heeded():  # another signal would end the wait for workers that save their state
            signal.signal(kind, signal.SIG_IGN)
        with suppress(ChildProcessError):  # which is how the wait ends
            while os.wait():
                pass
        sys.exit(128 + error.sigval)
    sys.exit(0)


def several_gpus(device: str) -> bool:
    """Whether the environment has several GPUs."""
    import torch

    from fewstep.distributed import pick_device

    return pick_device(device).type == "cuda" and torch.cuda.device_count() > 1
