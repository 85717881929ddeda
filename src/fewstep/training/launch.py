"""The one distributed launch, for DVC, Snakemake, srun, Kubernetes and a plain shell.

`fewstep train NAME` is the same command everywhere. It reads from the environment how many nodes
there are and which one this is, and becomes torchrun with one process per GPU. If Slurm allocated
several nodes but started a single task, it first becomes srun with one task per node.
"""

import glob
import logging
import os
import re
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # a Snakemake profile counts GPUs with this module; torch would take 2 s
    from fewstep.distributed import Rank

# Slurm warns with SIGUSR1 and stops with SIGTERM; Ctrl-C is SIGINT. Workers save on all three.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
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


def launch(device: str) -> NoReturn:
    """Run this command line again on all nodes and GPUs of the environment; exit as it does.

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
    # torchrun's default of 1 would leave the other cores idle
    os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads() // count, 1)))
    print(f"launch: {describe(nodes, count, kind)}", flush=True)
    run([*torchrun_arguments(nodes, count), "-m", "fewstep", *sys.argv[1:]])


@contextmanager
def ranks(device: str, if_several: bool = False) -> Generator["Rank"]:
    """This process's rank among the launched ones; launches them first if that is not done.

    Args:
        if_several: launch only if there are several GPUs to share the work; a training on a single
            one wants torchrun's handling of signals, but sampling and scoring do without.
    """
    from fewstep.distributed import joined

    if not launched() and (several_gpus(device) or not if_several):
        launch(device)
    with joined(device) as rank:
        yield rank


def find_nodes(environ: Mapping[str, str]) -> Nodes:
    """Read NNODES or WORLD_SIZE with MASTER_ADDR, else SLURM_*; without these, one node.

    If set, MASTER_ADDR and MASTER_PORT also override the meeting point derived from Slurm.

    Raises:
        ValueError: several nodes without MASTER_ADDR or RANK, or a Slurm step with several tasks
            per node.
    """
    count = int(environ.get("NNODES", environ.get("WORLD_SIZE", 1)))
    if count > 1:
        return _declared(environ, count)
    tasks, job = int(environ.get("SLURM_STEP_NUM_TASKS", 1)), environ.get("SLURM_JOB_ID")
    if job is None:
        return Nodes(1, 0, "this machine")
    if tasks > 1:
        return _slurm_step(environ, tasks, job)
    inside = "SLURM_STEP_ID" in environ  # somebody's srun asked for one task: respect it
    count = 1 if inside else _slurm_nodes(environ, job)
    return Nodes(count, 0, f"Slurm job {job}", job=job, spread=count > 1)


def _declared(environ: Mapping[str, str], count: int) -> Nodes:
    """This node as Kubernetes' training jobs and shells describe it."""
    index = environ.get("NODE_RANK", environ.get("RANK"))
    if "MASTER_ADDR" not in environ or index is None:
        raise ValueError(
            f"need MASTER_ADDR and RANK (this node's number) with {count} nodes, got "
            f"MASTER_ADDR={environ.get('MASTER_ADDR')}, RANK={index} (environment)"
        )
    endpoint = f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', 29400)}"
    return Nodes(count, int(index), "MASTER_ADDR", endpoint)


def _slurm_step(environ: Mapping[str, str], tasks: int, job: str) -> Nodes:
    count, step = int(environ["SLURM_STEP_NUM_NODES"]), environ["SLURM_STEP_ID"]
    if tasks != count:
        raise ValueError(
            f"need one task a node, since torchrun starts the rest, got {tasks} tasks on {count} "
            "nodes (srun --ntasks-per-node=1)"
        )
    host = environ.get("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    port = environ.get("MASTER_PORT", 20000 + int(job) % 10000)
    attempt = environ.get("SLURM_RESTART_COUNT", "0")
    index, name = int(environ["SLURM_NODEID"]), f"{job}.{step}"
    return Nodes(count, index, f"Slurm step {name}", f"{host}:{port}", f"{name}.{attempt}")


def _slurm_nodes(environ: Mapping[str, str], job: str) -> int:
    """Number of nodes of the job; squeue knows it where Snakemake's Slurm plugin hides it."""
    count = environ.get("SLURM_JOB_NUM_NODES")
    if count is None:
        ask = ["squeue", "--noheader", f"--jobs={job}", "--format=%D"]
        count = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    return int(count)


def first_host(nodelist: str) -> str:
    """The first name in a Slurm node list: `gpu07` in `gpu[07-09,12],big1`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodelist)
    if match is None:
        raise ValueError(f"need a list of nodes, got {nodelist!r} (SLURM_STEP_NODELIST)")
    return "".join(part or "" for part in match.groups())


def torchrun_arguments(nodes: Nodes, count: int) -> list[str]:
    """torchrun with `count` processes on this node; c10d connects several nodes."""
    here = f"--nproc-per-node={count}"
    if nodes.endpoint is None:
        return ["--standalone", here]
    # torchrun guesses is_host by host name, but a node may not know the name that others use for it
    conf = f"--rdzv-conf=is_host={int(nodes.index == 0)}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={nodes.endpoint}", f"--rdzv-id={nodes.job}"]
    return [f"--nnodes={nodes.count}", here, *meeting, conf]


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

    # the failing worker prints its own error; torchrun would add a page about it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    try:
        run.main(arguments)
    except ChildFailedError as error:
        code = next(iter(error.failures.values())).exitcode
        sys.exit(code if code >= 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that CUDA would see, without the 2 s that importing torch takes."""
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(devices, len(named))


def say_gpus(count: int) -> None:
    """Print on stderr what `snakemake --profile gpu` will run on."""
    what = f"{count} GPUs" if count else "no GPU here, so everything runs on the CPU"
    print(f"profile gpu: {what}", file=sys.stderr, flush=True)


def several_gpus(device: str) -> bool:
    """Whether the environment has several GPUs."""
    import torch

    from fewstep.distributed import pick_device

    return pick_device(device).type == "cuda" and torch.cuda.device_count() > 1
