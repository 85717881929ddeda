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
from fewstep.training.guards import STOPPING
from fewstep.training.launch import Nodes, find_nodes, first_host, launched, torchrun_arguments
from places import ROOT

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
}
# what Kubeflow sets for a pod: the training operator (whose WORLD_SIZE counts processes), Trainer 2
OPERATOR = {"WORLD_SIZE": "16", "RANK": "1", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"}
OPERATOR |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"}
TRAINER = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "node-0"}
TRAINER |= {"PET_MASTER_PORT": "29501", "PET_NPROC_PER_NODE": "1"}
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
        (OPERATOR, Nodes(2, 1, "MASTER_ADDR", "job-0:23456")),
        ({**OPERATOR, "PET_NNODES": "1", "PET_NODE_RANK": "0"}, Nodes(1, 0, "this machine")),
        (TRAINER, Nodes(2, 0, "PET_MASTER_ADDR", "node-0:29501")),
        ({**TRAINER, **KUBERNETES}, Nodes(2, 0, "PET_MASTER_ADDR", "node-0:29501")),
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


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": ""}, "got '' .*WORLD_SIZE"),
        ({"NNODES": "two"}, "got 'two' .*NNODES"),
        ({"PET_NNODES": "1:3"}, "got '1:3' .*PET_NNODES"),
        ({**KUBERNETES, "RANK": ""}, "got '' .*: RANK"),
        ({**TRAINER, "PET_NODE_RANK": "-1"}, "got '-1' .*PET_NODE_RANK"),
        ({**KUBERNETES, "MASTER_ADDR": ""}, "MASTER_ADDR=, .*environment: MASTER_ADDR"),
        (
            {**KUBERNETES, "MASTER_PORT": "tcp://10.0.0.1:80"},
            "got 'tcp://10.0.0.1:80' .*MASTER_PORT",
        ),
        ({**STEP, "MASTER_PORT": "tcp://10.0.0.1:80"}, "got 'tcp://10.0.0.1:80' .*MASTER_PORT"),
        ({**KUBERNETES, "RANK": "4"}, "below 4, got 4 .*RANK; WORLD_SIZE counts nodes"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": ""}, "got '' .*SLURM_JOB_NUM_NODES"),
        ({"SLURM_JOB_ID": ""}, "got '' .*SLURM_JOB_ID"),
        ({**STEP, "SLURM_NODEID": ""}, "got '' .*SLURM_NODEID"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}, "got nothing .*SLURM_STEP_NUM_NODES"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=f"need .*{said}"):
        find_nodes(environ)


def test_a_service_called_master_is_no_meeting_point_of_one_machine() -> None:
    assert find_nodes({"MASTER_PORT": "tcp://10.0.0.1:80"}) == Nodes(1, 0, "this machine")


@pytest.mark.parametrize("nodes", [Nodes(1, 0, "here"), Nodes(2, 1, "there", "a:1")])
def test_torchrun_does_not_take_the_shape_from_the_environment(nodes: Nodes) -> None:
    shape = {f"--nnodes={nodes.count}", "--nproc-per-node=3"}
    assert shape <= set(torchrun_arguments(nodes, 3))


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


def test_a_squeue_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path / "bin", "squeue", "echo down for repair >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(ValueError, match="got: down for repair .*SLURM_JOB_ID=7"):
        find_nodes({"SLURM_JOB_ID": "7"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="got: .*squeue"):
        find_nodes({"SLURM_JOB_ID": "7"})


def test_a_job_of_several_nodes_becomes_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_params(tmp_path)
    for needed in ("data.lmdb", "models/teacher/model.safetensors"):
        (tmp_path / "artifacts" / needed).mkdir(parents=True)
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


WORKER = """
import pathlib, sys, time
from fewstep.training.guards import caught_signals
with caught_signals() as caught:
    pathlib.Path("ready").touch()
    while not caught and not pathlib.Path("enough").exists():
        time.sleep(0.05)
    pathlib.Path("saving").touch()
    time.sleep(2)
    pathlib.Path("saved").write_text(str(caught[:1]))
sys.exit(128 + caught[0] if caught else 0)
"""
LAUNCHER = """
from fewstep.training.launch import run
run(['--standalone', '--nproc-per-node=1', 'worker.py'])
"""


def launcher(
    folder: Path, worker: str, ignored: signal.Signals | None = None
) -> subprocess.Popen[bytes]:
    """Start the launch of a worker, once it is ready if it says so."""
    (folder / "worker.py").write_text(worker)

    def inherit() -> None:
        for kind in STOPPING:  # whatever these tests were started with
            signal.signal(kind, signal.SIG_IGN if kind == ignored else signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=folder, preexec_fn=inherit)
    while '"ready"' in worker and not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("kind", STOPPING)
def test_a_signal_reaches_the_workers_which_save_first(
    kind: signal.Signals, tmp_path: Path
) -> None:
    process = launcher(tmp_path, WORKER)
    process.send_signal(kind)
    assert process.wait(60) == 128 + kind
    assert (tmp_path / "saved").read_text() == f"[{int(kind)}]"


def test_more_signals_do_not_end_the_wait_for_the_state(tmp_path: Path) -> None:
    """A terminal that closes sends several."""
    process = launcher(tmp_path, WORKER)
    process.send_signal(signal.SIGHUP)
    while not (tmp_path / "saving").exists():
        time.sleep(0.05)
    for kind in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(kind)
        time.sleep(0.1)
    process.wait(60)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_to_be_ignored_is(kind: signal.Signals, tmp_path: Path) -> None:
    """As `nohup` and a script's `&` ask."""
    process = launcher(tmp_path, WORKER, ignored=kind)
    os.kill(process.pid, kind)
    time.sleep(1)
    assert process.poll() is None and not (tmp_path / "saving").exists()
    (tmp_path / "enough").touch()
    assert process.wait(60) == 0


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
