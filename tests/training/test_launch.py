"""The launch: what it makes of the environment, how nodes meet, how signals and failures end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiment import set_up, tiny_params
from fewstep.paths import MODELS
from fewstep.training import launch
from fewstep.training.launch import Nodes, count_gpus, find_nodes, first_host, launched
from places import ROOT

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
}
KUBERNETES = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Nodes(1, 0, "this machine")),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a"}, Nodes(1, 0, "this machine")),
        (KUBERNETES, Nodes(4, 3, "MASTER_ADDR", "pod-0:23456")),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"},
            Nodes(2, 0, "MASTER_ADDR", "a:29400"),
        ),
        (STEP, Nodes(2, 1, "Slurm step 7.0", "gpu07:20007", "7.0.0")),
        (
            {**STEP, "SLURM_RESTART_COUNT": "2", "MASTER_ADDR": "10.0.0.1"},
            Nodes(2, 1, "Slurm step 7.0", "10.0.0.1:20007", "7.0.2"),
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, Nodes(1, 0, "Slurm job 7", job="7")),
        (
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"},
            Nodes(3, 0, "Slurm job 7", job="7", spread=True),
        ),
        (  # a step of one task inside a larger job was meant to be alone
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_STEP_ID": "0"},
            Nodes(1, 0, "Slurm job 7", job="7"),
        ),
    ],
)
def test_the_environment_says_how_many_nodes(environ: dict[str, str], expected: Nodes) -> None:
    assert find_nodes(environ) == expected


def test_the_kubernetes_job_says_what_the_launch_reads() -> None:
    service, job = yaml.safe_load_all((ROOT / "workflow" / "kubernetes.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    environ = {variable["name"]: variable.get("value", "1") for variable in container["env"]}
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"  # as Indexed Jobs name it
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert find_nodes(environ) == Nodes(2, 1, "MASTER_ADDR", f"{host}:29400")


def test_eight_tasks_a_node_are_refused() -> None:
    eight = {**STEP, "SLURM_STEP_NUM_TASKS": "16"}
    with pytest.raises(ValueError, match="need one task a node.*got 16 tasks on 2 nodes"):
        find_nodes(eight)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "RANK"])
def test_nodes_that_cannot_meet_are_refused(missing: str) -> None:
    environ = {name: value for name, value in KUBERNETES.items() if name != missing}
    with pytest.raises(ValueError, match=f"need MASTER_ADDR and RANK .*{missing}=None"):
        find_nodes(environ)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu[07-09,12],big1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("n1,n2", "n1"),
        ("rack-2-node4", "rack-2-node4"),
        ("a1.cluster", "a1.cluster"),
    ],
)
def test_the_first_host_of_slurms_notation(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def command(folder: Path, name: str, script: str) -> None:
    """Put an executable of that name into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm_is_asked_where_snakemake_hides_the_number_of_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path / "bin", "squeue", 'test "$2" = --jobs=7 && echo 2')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert find_nodes({"SLURM_JOB_ID": "7"}) == Nodes(2, 0, "Slurm job 7", job="7", spread=True)


def test_a_job_of_several_nodes_becomes_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_params(tmp_path)
    command(tmp_path / "bin", "srun", 'echo "$@"; exit 5')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    train = [sys.executable, "-m", "fewstep", "train", "cd"]
    run = subprocess.run(train, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert run.returncode == 5, "srun has taken the process over"
    shape = "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none"
    assert run.stdout.splitlines() == [
        f"launch: 2 nodes (Slurm job 7): srun {shape}",
        f"{shape} {sys.executable} -m fewstep train cd",
    ]


def test_only_a_worker_of_torchrun_is_launched() -> None:
    worker = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert launched(worker)
    assert not launched(KUBERNETES), "RANK numbers nodes there"
    assert not launched({})


def test_gpus_are_counted_as_cuda_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.glob, "glob", lambda _: [f"/dev/nvidia{i}" for i in range(4)])
    seen = [count_gpus({"CUDA_VISIBLE_DEVICES": v}) for v in ("", "-1", "2", "0,3", "GPU-a,GPU-b")]
    assert count_gpus({}) == 4 and seen == [0, 0, 1, 2, 2]


WORKER = """
import os, pathlib, signal, sys, time
stop = []
for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(kind, lambda number, frame: stop.append(number))
pathlib.Path("ready").touch()
while not stop:
    time.sleep(0.05)
pathlib.Path("saved").write_text(str(stop[0]))
sys.exit(128 + stop[0])
"""
LAUNCHER = """
from fewstep.training.launch import run
run(['--standalone', '--nproc-per-node=1', 'worker.py'])
"""


def launcher(folder: Path, worker: str) -> subprocess.Popen[bytes]:
    (folder / "worker.py").write_text(worker)
    return subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=folder)


@pytest.mark.parametrize("kind", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_workers_which_save_first(
    kind: signal.Signals, tmp_path: Path
) -> None:
    process = launcher(tmp_path, WORKER)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(kind)
    assert process.wait(60) == 128 + kind
    assert (tmp_path / "saved").read_text() == str(int(kind))


@pytest.mark.parametrize(
    ("worker", "code"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("", 0)],
)
def test_it_exits_as_its_worker_did(worker: str, code: int, tmp_path: Path) -> None:
    assert launcher(tmp_path, worker).wait(60) == code


@pytest.mark.slow
def test_two_nodes_meet_and_train_what_two_processes_of_one_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    """Four ways to say two ranks; the last three are two nodes of one process each."""
    set_up(tmp_path, monkeypatch)
    tiny_params(tmp_path, data__source="toy.npz")
    train = ["-m", "fewstep", "train", "cd"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *torchrun, *train], check=True, env=environ)
    expected = (MODELS / "cd" / "model.safetensors").read_bytes()
    port = {"MASTER_PORT": str(unused_tcp_port)}
    for index, nodes in enumerate(
        [
            [{"WORLD_SIZE": "2", "RANK": rank, **port} for rank in "01"],
            [{"NNODES": "2", "NODE_RANK": rank, **port} for rank in "01"],
            [{**STEP, "SLURM_NODEID": rank, **port} for rank in "01"],
        ]
    ):
        (MODELS / "cd" / "model.safetensors").unlink()
        runs = [
            subprocess.Popen([sys.executable, *train], env={**environ, **node}, stdout=-1)
            for node in nodes
        ]
        outputs = [run.communicate(timeout=300)[0].decode() for run in runs]
        assert [run.returncode for run in runs] == [0, 0], index
        assert "this is node 1, meeting at 127.0.0.1:" in outputs[1]
        assert (MODELS / "cd" / "model.safetensors").read_bytes() == expected, index


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
