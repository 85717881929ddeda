"""benchmarks/gpu_check.py, rehearsed on a CPU at tiny size, and benchmarks/gpu_run.sh."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml

from experiment import tiny_params
from fewstep.files import read_json
from fewstep.planning.plan import GPUS
from places import CONFIG, ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module; what it imports beside itself is forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    import gpu_check  # pyright: ignore[reportMissingImports]

    yield gpu_check
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


def test_a_measurement_that_fails_is_noted_and_the_next_is_made(check: Any, tmp_path: Path) -> None:  # noqa: ANN401
    options = SimpleNamespace(out=tmp_path, preset="tiny.yaml")
    bench = check.Bench(options, tiny_params(tmp_path), torch.device("cpu"))

    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    bench.measure("first", fail)
    bench.measure("second", lambda: {"rate": 3.0})
    assert bench.failed
    assert read_json(tmp_path / "first.json")["error"] == "RuntimeError: out of memory"
    assert read_json(tmp_path / "second.json")["rate"] == 3.0
    text = "\n".join(check.lines(tmp_path, {"steps": "failed"}))
    assert "first: RuntimeError: out of memory" in text and "Part steps: failed." in text


def measured(method: str, what: str, compiled: str, rate: float) -> dict[str, Any]:
    """A file of a variant that computes so many images of 1 TFLOP a second."""
    variant = "fast+compile-blocks" if compiled == "blocks" else "fast+no-compile"
    cell = {"images_per_second": rate, "utilisation": 0.5}
    return {
        "method": method,
        "settings": {"variants": {variant: {"precision": "bf16", "compile": compiled}}},
        "measured": {what: {"flops_per_image": 1e12, "variants": {variant: cell}}},
    }


def test_measurements_become_lines_for_the_plan(check: Any) -> None:  # noqa: ANN401
    found = {
        "a": measured("dmd2", "dmd2-1", "none", 300.0),
        "b": measured("dmd2", "dmd2-10", "none", 200.0),
        "c": measured("dmd2", "dmd2-1", "blocks", 400.0),
        "failed": {"error": "RuntimeError"},
    }
    peak = GPUS["h100"].flops["bf16"] / 1e12
    assert check.shares(found, "h100", "here") == [
        ["h100", "dmd2", "none", f"{200 / peak:.3f}", "measured", "here"],
        ["h100", "dmd2", "blocks", f"{400 / peak:.3f}", "measured", "here"],
    ]


def test_only_files_with_cuda_tests_are_collected(check: Any) -> None:  # noqa: ANN401
    """Others import DVC and Snakemake, and one file that cannot be imported ends a collection."""
    found = {Path(file).name for file in check.cuda_files()}
    assert {"test_cuda.py", "test_compute.py", "test_quiet.py", "test_consistency.py"} <= found
    for file in check.cuda_files():
        lacking = r"^(import|from) (dvc|wandb|snakemake|diffusers)"
        assert not re.search(lacking, Path(file).read_text(), re.MULTILINE)


def test_tests_that_were_stopped_tell_how_far_they_came(check: Any, tmp_path: Path) -> None:  # noqa: ANN401
    said = "tests/a.py::one PASSED [ 33%]\ntests/a.py::two[x] FAILED [ 66%]\ntests/a.py::three "
    (tmp_path / "tests.txt").write_text(said)
    assert "tests: stopped; 1 passed, 1 failed" in "\n".join(check.lines(tmp_path, {}))
    assert check.stopped_tests(said).endswith("the last begun: tests/a.py::three")


def ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_part_that_is_late_is_ended_with_its_children(
    check: Any,  # noqa: ANN401
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "late.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(check, "__file__", str(tmp_path / "late.py"))
    assert check.in_process("steps", 3.0) == "stopped after 3 s"
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60  # a busy process dies some time after it was sent the signal
    while not ended(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow  # minutes: what is compiled is compiled by C++
def test_all_parts_run_at_tiny_size_where_there_is_no_gpu(tmp_path: Path) -> None:
    small = ["--batch", "4", "--pairs", "1", "--methods", "cd", "mm-2", "--images", "60"]
    parts = ["matrix", "steps", "generation", "features", "tests", "compiled", "tuned"]
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", "found", *small]
    command += ["--preset", str(CONFIG / "tiny.yaml"), "--most-steps", "2", "--parts", *parts]
    command += ["--tests", "tests/test_cuda.py", "--slower", "20", "--budget", "3000"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {file.stem: read_json(file) for file in (tmp_path / "found").glob("*.json")}
    assert {name: note.split()[0] for name, note in found["parts"].items()} == dict.fromkeys(
        parts, "done"
    )
    for name in ("cd", "mm-2"):
        for variant in ("plain", "fast+no-compile", "fast+compile-blocks", "fast+cudnn-benchmark"):
            assert f"| {name} | {variant} | " in run.stdout
            assert found[f"step-{name}-{variant}"]["measured"][name]["variants"]
    for row in found["generation-plain"]["measured"].values():
        assert row["variants"]["plain"]["memory_gib"] > 0
    assert "Features of 60 images, efficientnet-lite0" in run.stdout
    assert "skipped" in found["tests"]["summary"][0] and not found["tests"]["failed"]
    assert not (tmp_path / "found" / "work").exists()


STAND_IN = """
import sys
from pathlib import Path
stage, *names = sys.argv[1:]
def write(file, text=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
if stage in ("download-teacher", "train"):
    name = "teacher" if stage == "download-teacher" else names[0]
    if name == "poor":
        sys.exit("fewstep train: out of memory")
    write(Path(f"artifacts/models/{name}/log.jsonl"))
if stage == "generate" and not Path(f"artifacts/models/{names[0]}/log.jsonl").exists():
    sys.exit("fewstep generate: no model")
if stage == "fid":
    write(Path(f"artifacts/scores/{names[0]}.json"))
if stage == "results-table":
    write(Path("results/table.md"), Path(names[1]).read_text())
"""
STAND_IN_PARAMS = """
import yaml
from types import SimpleNamespace
def load_params(path):
    raw = yaml.safe_load(open(path))
    students = {name: SimpleNamespace(**block) for name, block in raw["students"].items()}
    return SimpleNamespace(students=students, rows=raw["rows"])
"""
EXPERIMENT = """
data:
  source: elsewhere # a comment
students:
  good: { init_from: teacher }
  poor: { init_from: teacher }
  later: { init_from: good }
rows:
  teacher: {}
  good: {}
  poor: {}
  later: {}
"""


def test_what_fails_in_a_run_stops_only_what_needs_it(tmp_path: Path) -> None:
    """With a stand-in for the package, whose models are empty files."""
    package = tmp_path / "repository" / "src" / "fewstep"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(STAND_IN)
    (package / "__init__.py").touch()
    (package / "params.py").write_text(STAND_IN_PARAMS)
    script = tmp_path / "repository" / "benchmarks" / "gpu_run.sh"
    script.parent.mkdir()
    shutil.copy(BENCHMARKS / "gpu_run.sh", script)
    (tmp_path / "p.yaml").write_text(EXPERIMENT)
    (tmp_path / "images").mkdir()
    environ = {**os.environ, "FEWSTEP_COMMIT": "c0ffee", "SLOWER": "9"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    run = subprocess.run(
        [str(script), "out", "images", "p.yaml"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, "something failed"
    stages = (tmp_path / "out" / "stages.txt").read_text()
    failed = [line for line in stages.splitlines() if "failed" in line]
    assert len(failed) == 2, stages
    assert "train poor took" in failed[0] and failed[0].endswith("out of memory")
    assert "generate poor" in failed[1]
    assert stages.index("train good") < stages.index("train later") < stages.index("generate")
    scored = yaml.safe_load((tmp_path / "out" / "results" / "table.md").read_text())
    assert list(scored["rows"]) == ["teacher", "good", "later"]
    assert list(scored["students"]) == ["good", "later"]
    assert scored["data"]["source"] == str(tmp_path / "images")
    assert (tmp_path / "out" / "logs" / "train-poor.txt").exists()


@pytest.mark.slow  # five minutes: each stage is a process
def test_a_preset_runs_without_dvc_and_its_results_come_back(tmp_path: Path) -> None:
    environ = {**os.environ, "SLOWER": "20", "OMP_NUM_THREADS": "1", "FEWSTEP_COMMIT": "c0ffee"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    command = [str(BENCHMARKS / "gpu_run.sh"), str(tmp_path / "out"), "", str(CONFIG / "tiny.yaml")]
    run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    stages = (tmp_path / "out" / "stages.txt").read_text()
    assert run.returncode == 0, stages + run.stderr
    assert "results-table" in stages and "failed" not in stages
    assert (tmp_path / "out" / "results" / "table.md").read_text() in run.stdout
    for folder in ("models", "scores", "logs", "times"):
        assert any((tmp_path / "out" / folder).iterdir()), folder
