"""scripts/cloud_start.sh against a server of this machine, with a data set made up here."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

from places import ROOT

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
KEY = {"WANDB_API_KEY": "0" * 40, "DISK_GB": "0"}


@dataclass
class Server:
    """A file, who asked for it and for which bytes."""

    url: str
    content: bytes
    asked: list[dict[str, str]] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (400, 1, 16, 16), np.uint8), np.arange(400) % 10
    np.savez(tmp_path / "images.npz", images=images, labels=labels)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(dict(self.headers))
            start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
            self.send_response(206 if start else 200)
            end = len(state.content) - 1
            if start:
                self.send_header("Content-Range", f"bytes {start}-{end}/{end + 1}")
            self.send_header("Content-Length", str(len(state.content) - start))
            self.end_headers()
            self.wfile.write(state.content[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        content = (tmp_path / "images.npz").read_bytes()
        state = Server(f"http://127.0.0.1:{http.server_port}/images.npz", content)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield state
        http.shutdown()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the script needs, and the preset `toy`, whose data are not there."""
    folder = tmp_path / "clone"
    for name in ("src", "config", "scripts", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "cache", "tmp")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    raw = yaml.safe_load((ROOT / "config" / "tiny.yaml").read_text())
    raw["data"]["source"] = "data/images.npz"
    raw["generate"]["images"] = 64
    raw["metric"] = {"features": "efficientnet-lite0", "reference_images": 256}
    (folder / "config" / "toy.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return folder


def start(clone: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(clone / "scripts" / "cloud_start.sh"), *arguments],
        cwd="/",
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=600,
    )


def environment(**extra: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_"))}
    return {**base, "PATH": PATH, "no_proxy": "*", **KEY, **extra}


def given(server: Server) -> dict[str, str]:
    return {"DATA_URL": server.url, "DATA_SHA256": server.sha256}


@pytest.mark.slow
def test_data_are_fetched_once_and_built(clone: Path, server: Server) -> None:
    command = ("toy", sys.executable, "-m", "fewstep", "build-lmdb")
    first = start(clone, *command, **given(server), PYTHONPATH="src")
    assert first.returncode == 0, first.stderr
    assert "3 students" in first.stdout and "train cd: " in first.stdout
    assert (clone / "data" / "images.npz").read_bytes() == server.content
    assert (clone / "artifacts" / "data.lmdb").is_file()
    params = (clone / "params.yaml").read_bytes()
    again = start(clone, *command, PYTHONPATH="src")  # no address: it is there
    assert again.returncode == 0, again.stderr
    assert len(server.asked) == 1 and (clone / "params.yaml").read_bytes() == params


@pytest.mark.slow
def test_a_download_goes_on_where_it_stopped(clone: Path, server: Server) -> None:
    (clone / "data").mkdir()
    (clone / "data" / "images.npz.part").write_bytes(server.content[:5000])
    done = start(clone, "toy", "true", **given(server))
    assert done.returncode == 0, done.stderr
    assert [headers.get("Range") for headers in server.asked] == ["bytes=5000-"]
    assert (clone / "data" / "images.npz").read_bytes() == server.content


@pytest.mark.slow
def test_another_file_is_refused_and_removed(clone: Path, server: Server) -> None:
    wrong = {**given(server), "DATA_SHA256": "0" * 64}
    done = start(clone, "toy", "true", **wrong)
    assert done.returncode == 1 and "need sha256 000" in done.stderr
    assert not list((clone / "data").iterdir())


@pytest.mark.slow
def test_the_token_goes_to_no_other_host(clone: Path, server: Server) -> None:
    done = start(clone, "toy", "true", **given(server), HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in str(server.asked) + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        (["nothing"], {}, "need a PRESET of config/, got 'nothing'"),
        (["../params"], {}, "need a PRESET of config/, got '../params'"),
        ([], {}, "need a PRESET of config/, got ''"),
        (["toy"], {"WANDB_API_KEY": ""}, "need WANDB_API_KEY"),
        (["toy"], {"DISK_GB": "99999999"}, "need 99999999 GB of disk, got"),
        (["toy"], {}, "need data/images.npz, or DATA_URL and DATA_SHA256"),
        (["toy"], {"TEACHER_SHA256": "x"}, "need 64 lowercase hex digits, got 'x'"),
        (["imagenet64"], {}, "need TEACHER_SHA256: imagenet64 does not have it"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_fetched(
    arguments: list[str], extra: dict[str, str], message: str, clone: Path
) -> None:
    done = start(clone, *arguments, **extra)
    assert done.returncode == 1 and message in done.stderr
    assert not [*(clone / "artifacts").glob("*"), *(clone / "data").glob("*")]


@pytest.mark.slow
def test_checksums_that_nobody_publishes_are_put_into_the_params(
    clone: Path, server: Server
) -> None:
    """Of the teacher and of the reference; all files come from the server here."""
    preset = clone / "config" / "imagenet64.yaml"
    raw = yaml.safe_load(preset.read_text())
    text = re.sub(r"url: https://\S+", f"url: {server.url}", preset.read_text())
    preset.write_text(text.replace(raw["metric"]["weights"]["sha256"], server.sha256))
    known = {"TEACHER_SHA256": server.sha256, "REFERENCE_SHA256": server.sha256}
    for name, stage in (("TEACHER_SHA256", "teacher"), ("REFERENCE_SHA256", "reference")):
        done = start(clone, "imagenet64", "true", **{**known, name: ""})
        assert done.returncode == 1 and f"need {name}: imagenet64" in done.stderr, stage
    (clone / "data").mkdir(exist_ok=True)
    (clone / "data" / "imagenet-64x64.zip").touch()
    done = start(clone, "imagenet64", "true", **known)
    assert done.returncode == 0, done.stderr
    params = yaml.safe_load((clone / "params.yaml").read_text())
    for block in (raw["teacher"], raw["metric"]["weights"], raw["metric"]["reference"]):
        block.update(url=server.url, sha256=server.sha256)
    assert params == raw
    assert len(server.asked) == 1, "three blocks of one file"


def test_a_stop_reaches_all_that_runs(clone: Path, server: Server) -> None:
    command = "trap 'echo saved; exit 143' TERM; echo ready; while true; do sleep 0.1; done"
    run = subprocess.Popen(
        [str(clone / "scripts" / "cloud_start.sh"), "toy", "bash", "-c", f"bash -c {command!r}"],
        env=environment(**given(server)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    lines = iter(run.stdout.readline, "")
    assert any(line == "ready\n" for line in lines)
    run.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert "saved\n" in run.stdout.read()
    assert run.wait(10) == 143 and time.monotonic() - started < 10


@pytest.mark.slow  # seven stages, each a new process that imports torch
def test_the_default_runs_the_pipeline(clone: Path, server: Server) -> None:
    toy = clone / "config" / "toy.yaml"
    raw = yaml.safe_load(toy.read_text())
    raw["students"] = {"cd": raw["students"]["cd"] | {"kimg": 0.064}}
    raw["rows"] = {"cd-4": raw["rows"]["cd-4"]}
    del raw["students"]["cd"]["validation"], raw["students"]["cd"]["phema"]
    raw["teacher"]["train"]["kimg"], raw["generate"]["seed_ranges"] = 0.064, 1
    toy.write_text(yaml.safe_dump(raw, sort_keys=False))
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    done = start(clone, "toy", **given(server), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (clone / "results" / "table.md").is_file()


@pytest.mark.slow  # a training, and DVC three times
def test_a_new_machine_with_the_same_mounts_repeats_no_stage(
    clone: Path, server: Server, tmp_path: Path
) -> None:
    toy = clone / "config" / "toy.yaml"
    toy.write_text(toy.read_text().replace("kimg: 1.024", "kimg: 0.064"))
    no_git = [sys.executable, "-m", "dvc", "config", "core.no_scm", "true"]
    subprocess.run(no_git, cwd=clone, check=True)
    other = shutil.copytree(clone, tmp_path / "other")
    command = ("toy", "dvc", "repro", "download-teacher")
    first = start(clone, *command, **given(server), OMP_NUM_THREADS="1")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("Running stage") == 2
    assert (clone / "dvc.lock").is_file() and not (clone / "dvc.lock").is_symlink()

    shutil.copy(ROOT / "dvc.lock", other)  # the image's, of another preset
    for name in ("artifacts", "data", "results", "scratch"):
        shutil.rmtree(other / name, ignore_errors=True)
        shutil.move(clone / name, other / name)
    made = {path: path.stat().st_mtime_ns for path in files(other)}
    again = start(other, *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Running stage" not in again.stdout
    assert again.stdout.count("didn't change, skipping") == 2
    assert {path: path.stat().st_mtime_ns for path in files(other)} == made

    shutil.rmtree(other / "artifacts" / "models" / "teacher")  # which DVC has a copy of
    third = start(other, *command)
    assert third.returncode == 0 and "Running stage" not in third.stdout, third.stdout
    assert set(files(other)) == set(made)


def files(clone: Path) -> list[Path]:
    """What the stages made."""
    return [path for path in (clone / "artifacts").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_what_dvc_writes_survives_a_kill(clone: Path, server: Server) -> None:
    command = "echo first >> dvc.lock; kill -9 $PPID"
    assert start(clone, "toy", "bash", "-c", command, **given(server)).returncode == -9
    (clone / "dvc.lock").unlink()
    (clone / "dvc.lock").write_text("of the image\n")
    done = start(clone, "toy", "cat", "dvc.lock")
    assert done.stdout.endswith("first\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_a_clone_with_a_cache_keeps_it_and_its_lock(clone: Path, server: Server) -> None:
    (clone / ".dvc" / "cache").mkdir()
    (clone / "dvc.lock").write_text("of this clone\n")
    done = start(clone, "toy", "cat", "dvc.lock", **given(server))
    assert done.stdout.endswith("of this clone\n"), done.stdout + done.stderr
    assert not (clone / ".dvc" / "config.local").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "needed"), [("imagenet64", 398), ("imagenet64-cd-seed", 608), ("toy", 200)]
)
def test_a_disk_that_the_plan_finds_too_small_stops_the_start(
    preset: str, needed: int, clone: Path
) -> None:
    known = {"TEACHER_SHA256": "a" * 64, "REFERENCE_SHA256": "a" * 64}
    disk = fake(clone, "df", f"printf 'Avail\\n{250_000_000 if needed > 200 else 1}\\n'")
    done = start(clone, preset, "true", **known, DISK_GB="", PATH=f"{disk}:{PATH}")
    assert done.returncode == 1 and f"need {needed} GB of disk" in done.stderr, done.stderr
    assert "DISK_GB" in done.stderr
    free = start(clone, preset, "true", **known, DISK_GB="0", PATH=f"{disk}:{PATH}")
    assert "need data/" in free.stderr, "the next thing that is missing"


@pytest.mark.slow
def test_what_is_there_already_needs_no_room(clone: Path) -> None:
    disk = fake(clone, "df", "printf 'Avail\\n1\\n'")
    fake(clone, "du", "printf '300000000\\ttotal\\n'")
    done = start(clone, "toy", "true", DISK_GB="", PATH=f"{disk}:{PATH}")
    assert "need data/images.npz" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "nodes", "said"),
    [
        ("NVIDIA H200", 8, {}, "1 x 8 x h200"),
        ("NVIDIA A100-PCIE-40GB", 4, {"NNODES": "2"}, "2 x 4 x a100-40"),
        ("NVIDIA GeForce RTX 4090", 1, {"SLURM_JOB_NUM_NODES": "3"}, "3 x 1 x rtx4090"),
    ],
)
def test_the_plan_is_of_the_gpus_that_are_there(
    name: str, count: int, nodes: dict[str, str], said: str, clone: Path
) -> None:
    tool = fake(clone, "nvidia-smi", f'for i in $(seq {count}); do echo "GPU $i: {name}"; done')
    done = start(clone, "toy", "true", **nodes, PATH=f"{tool}:{PATH}")
    assert f"hardware: {said}, fp32" in done.stdout, done.stdout + done.stderr


def fake(clone: Path, name: str, script: str) -> Path:
    """A program of that name, in a folder for PATH."""
    folder = clone / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    script = ROOT / "scripts" / "cloud_start.sh"
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
