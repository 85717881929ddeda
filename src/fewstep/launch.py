"""The one distributed launch, for DVC, Snakemake, srun, Kubernetes and a plain shell.

`fewstep train NAME` is the same command everywhere. It reads from the environment how many nodes
there are and which of them this is, and becomes torchrun with one process a GPU; where Slurm gave
several nodes and started only one task, it becomes srun first, one task a node.
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

if TYPE_CHECKING:  # torch is not imported here: a Snakemake profile counts GPUs with this module
    from fewstep.distributed import Rank

# Slurm warns by SIGUSR1, stops by SIGTERM; Ctrl-C is SIGINT. Workers save their state on each.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PATIENCE = 600  # seconds that workers have for saving; Slurm and users kill earlier if they wish


@dataclass(frozen=True)
class Nodes:
    """Where this process stands: node `index` of `count`, all of which meet at `endpoint`."""

    count: int
    index: int
    source: str  # what said so, for the line that is printed
    endpoint: str | None = None  # host:port; None on a single node
    job: str = "fewstep"  # the same on all nodes, another for another run
    spread: bool = False  # one task of a job of several nodes: srun has to start the others


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of the workers that torchrun started."""
    return all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def launch(device: str) -> NoReturn:
    """Run this command line again on all nodes and GPUs that the environment gives; exit alike.

    A CPU gets one process with all its cores: two with half of them are no faster.

    Raises:
        ValueError: the environment contradicts itself, or CUDA is asked for and there is none.
    """
    import torch

    from fewstep.distributed import pick_device

    nodes = find_nodes(os.environ)
    if nodes.spread:
        arguments = srun_arguments(nodes)
        print(f"launch: {nodes.count} nodes ({nodes.source}): {' '.join(arguments)}", flush=True)
        os.execvp("srun", [*arguments, sys.executable, "-m", "fewstep", *sys.argv[1:]])
    kind = pick_device(device).type
    count = torch.cuda.device_count() if kind == "cuda" else 1
    # torchrun would say 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads() // count, 1)))
    print(f"launch: {describe(nodes, count, kind)}", flush=True)
    run([*torchrun_arguments(nodes, count), "-m", "fewstep", *sys.argv[1:]])


@contextmanager
def ranks(device: str, spread: bool = True) -> Generator["Rank"]:
    """This process among those of the launch, which is made first where it has not been.

    Args:
        spread: False: no launch, this process does it alone.
    """
    from fewstep.distributed import joined

    if spread and not launched():
        launch(device)
    with joined(device) as rank:
        yield rank


def find_nodes(environ: Mapping[str, str]) -> Nodes:
    """Read the usual variables: NNODES or WORLD_SIZE with MASTER_ADDR, then SLURM_*; else alone.

    MASTER_ADDR and MASTER_PORT, where set, also win over the meeting point that Slurm suggests.

    Raises:
        ValueError: several nodes without MASTER_ADDR or RANK; a Slurm step of several tasks a node.
    """
    count = int(environ.get("NNODES", environ.get("WORLD_SIZE", 1)))
    if count > 1:
        return _declared(environ, count)
    tasks, job = int(environ.get("SLURM_STEP_NUM_TASKS", 1)), environ.get("SLURM_JOB_ID")
    if job is None:
        return Nodes(1, 0, "this machine")
    if tasks > 1:
        return _slurm_step(environ, tasks, job)
    inside = "SLURM_STEP_ID" in environ  # a step of one task was wanted on one node
    count = 1 if inside else _slurm_nodes(environ, job)
    return Nodes(count, 0, f"Slurm job {job}", job=job, spread=count > 1)


def _declared(environ: Mapping[str, str], count: int) -> Nodes:
    """Nodes as Kubernetes' training jobs and shells describe them, by name and number."""
    index = environ.get("NODE_RANK", environ.get("RANK"))
    if "MASTER_ADDR" not in environ or index is None:
        raise ValueError(
            f"need MASTER_ADDR and RANK (this node's number) beside {count} nodes, got "
            f"MASTER_ADDR={environ.get('MASTER_ADDR')}, RANK={index} (environment)"
        )
    endpoint = f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', 29400)}"
    return Nodes(count, int(index), "MASTER_ADDR", endpoint)


def _slurm_step(environ: Mapping[str, str], tasks: int, job: str) -> Nodes:
    count, step = int(environ["SLURM_STEP_NUM_NODES"]), environ["SLURM_STEP_ID"]
    if tasks != count:
        raise ValueError(
            f"need one task a node, torchrun starts the rest; got {tasks} tasks on {count} nodes "
            "(srun --ntasks-per-node=1)"
        )
    host = environ.get("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    port = environ.get("MASTER_PORT", 20000 + int(job) % 10000)
    attempt = environ.get("SLURM_RESTART_COUNT", "0")
    index, name = int(environ["SLURM_NODEID"]), f"{job}.{step}"
    return Nodes(count, index, f"Slurm step {name}", f"{host}:{port}", f"{name}.{attempt}")


def _slurm_nodes(environ: Mapping[str, str], job: str) -> int:
    """Nodes of the job; Snakemake's Slurm plugin hides their number, so Slurm is asked."""
    count = environ.get("SLURM_JOB_NUM_NODES")
    if count is None:
        ask = ["squeue", "--noheader", f"--jobs={job}", "--format=%D"]
        count = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    return int(count)


def first_host(nodelist: str) -> str:
    """The first name in Slurm's notation: `gpu[07-09,12],big1` gives `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodelist)
    if match is None:
        raise ValueError(f"need a list of nodes, got {nodelist!r} (SLURM_STEP_NODELIST)")
    return "".join(part or "" for part in match.groups())


def srun_arguments(nodes: Nodes) -> list[str]:
    """srun over the whole job, one task a node that may use all of the node's share."""
    shape = [f"--nodes={nodes.count}", f"--ntasks={nodes.count}", "--ntasks-per-node=1"]
    return ["srun", *shape, "--cpu-bind=none"]  # a bound task would have one core


def torchrun_arguments(nodes: Nodes, count: int) -> list[str]:
    """torchrun with `count` processes on this node; several nodes find one another by c10d."""
    here = f"--nproc-per-node={count}"
    if nodes.endpoint is None:
        return ["--standalone", here]
    return [
        f"--nnodes={nodes.count}",
        here,
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={nodes.endpoint}",
        f"--rdzv-id={nodes.job}",
        # said, not guessed: a node need not know itself by the name that the others call it
        f"--rdzv-conf=is_host={int(nodes.index == 0)}",
    ]


def describe(nodes: Nodes, count: int, kind: str) -> str:
    """What was chosen, and why: `2 nodes x 8 cuda, this is node 1, meeting at n7:20012 (...)`."""
    if nodes.endpoint is None:
        return f"{count} x {kind} ({nodes.source})"
    where = f"this is node {nodes.index}, meeting at {nodes.endpoint}"
    return f"{nodes.count} nodes x {count} {kind}, {where} ({nodes.source})"


def run(arguments: list[str]) -> NoReturn:
    """torchrun in this process: forwards signals to the workers, exits as the first of them did."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # what went wrong is said by the process that it went wrong in
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
    """GPUs that CUDA would see, without the two seconds that asking torch takes."""
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(devices, len(named))


def say_gpus(count: int) -> None:
    """What `snakemake --profile gpu` will run on, said once, on stderr."""
    what = f"{count} GPUs" if count else "no GPU here, so everything runs on the CPU"
    print(f"profile gpu: {what}", file=sys.stderr, flush=True)


def several_gpus(device: str) -> bool:
    """Whether sampling and scoring have something to share; else they need no further process."""
    import torch

    from fewstep.distributed import pick_device

    return pick_device(device).type == "cuda" and torch.cuda.device_count() > 1
