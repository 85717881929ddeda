"""The benchmark: all parts are there, add up, and variants compute the same."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment import tiny_params
from fewstep.files import read_json
from fewstep.networks.registry import build_denoiser
from fewstep.params import Performance
from fewstep.planning.flops import forward_flops
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
METHODS = ["teacher", "cd", "dmd2-1", "dmd2-4", "mm-2"]
VARIANTS = ["fast", "plain"]


def bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`make bench` of config/tiny.yaml without dropout, whose masks follow the layout."""
    tiny_params(folder, teacher__train__dropout=0.0, students__cd__dropout=0.0)
    out = str(folder / "found.json")
    command = [sys.executable, str(BENCHMARKS), "params.yaml", "--out", out, "--pairs", "1"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], cwd=folder, env=environ, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("bench")
    run = bench(folder, "--batch", "8", "--images", "300")
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


@pytest.fixture(scope="module")
def found(done: tuple[Path, str]) -> dict[str, Any]:
    return read_json(done[0] / "found.json")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmark's own modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


def test_every_method_kind_of_row_and_variant_is_measured(found: dict[str, Any]) -> None:
    steps = {name: row["steps"] for name, row in found["training"].items()}
    assert list(steps.items()) == list(zip(METHODS, (1, 1, 2, 2, 2), strict=True))
    assert set(found["generation"]) == {
        "heun 4",
        "euler 4",
        "churn 4",
        "ddim 4",
        "renoise 1",
        "ancestral 2",
        "renoise 4 guided",
    }
    for row in [*found["training"].values(), *found["generation"].values()]:
        assert list(row["variants"]) == VARIANTS
        for variant in row["variants"].values():
            assert variant["images_per_second"] == pytest.approx(row["images"] / variant["seconds"])
            assert 0 < variant["cpu_seconds"]
            assert 0 < variant["utilisation"] < 1
        assert row["variants"]["plain"]["speedup"] == 1.0
    assert found["one_call"]["images"] == 8 and found["one_call"]["cpu_speedup"] > 0
    assert found["features"]["extraction"]["images_per_second"] > 0
    assert found["data"]["random_read"]["images_per_cpu_second"] > 0
    assert 0 < found["data"]["ingest"]["images_per_second"] < 300
    plain = vars(Performance("contiguous", "plain", "plain", "loop"))
    assert found["variants"]["plain"] == {"precision": "fp32", **plain, "recompute": []}


def test_what_imagenet_takes_is_reckoned_from_fewer_images(
    modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ingest  # pyright: ignore[reportMissingImports]

    def build(data: object, images: int) -> dict[str, float]:  # 100 images/s, 2 kB each
        return {"images": images, "images_per_second": 100.0, "peak_bytes": 10**8 + 2000 * images}

    monkeypatch.setattr(ingest, "_build", build)
    found = ingest.ingest_rates(50_000)
    assert found["images"] == 50_000 and found["peak_bytes"] == 2 * 10**8
    assert found["imagenet_minutes"] == pytest.approx(1_281_167 / 6000)
    assert found["imagenet_peak_bytes"] == pytest.approx(10**8 + 2000 * 1_281_167)


def test_the_memory_of_a_family_and_its_processor_time_are_measured(
    modules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ingest  # pyright: ignore[reportMissingImports]
    import psutil

    holds = "held = bytearray(b'1') * 10**8; import time; print(flush=True); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}])"
    process = psutil.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    try:
        assert 10**8 < ingest._resident(process) < 2 * 10**8
    finally:
        for member in [*process.children(recursive=True), process]:
            member.kill()
        process.wait()


def test_parts_add_up_to_the_step(found: dict[str, Any]) -> None:
    for name, row in found["training"].items():
        for variant in row["variants"].values():
            together = sum(variant["cpu_parts"].values())
            # another cycle than the one that was measured whole, of other roll-outs
            assert variant["cpu_seconds"] / 3 < together < 3 * variant["cpu_seconds"], name
            assert variant["parts"]["rest"] < 0.3 * sum(variant["parts"].values()), name


def test_a_part_is_timed_where_the_method_has_it(found: dict[str, Any]) -> None:
    parts = {name: row["variants"]["fast"]["parts"] for name, row in found["training"].items()}
    everywhere = {"data", "student", "backward", "optimiser", "averages", "log", "rest"}
    only = {
        "teacher": everywhere,
        "cd": {*everywhere, "teacher"},
        "dmd2-1": {*everywhere, "teacher", "critic", "critic backward"},
        "dmd2-4": {*everywhere, "teacher", "critic", "critic backward"},
        "mm-2": {*everywhere, "teacher", "critic", "critic backward"},
    }
    for name, seconds in parts.items():
        assert {part for part, value in seconds.items() if value > 0} == only[name]


def test_variants_have_equal_losses(found: dict[str, Any]) -> None:
    for row in found["training"].values():
        fast, plain = (row["variants"][v]["loss"] for v in VARIANTS)
        assert fast and fast == pytest.approx(plain, rel=1e-4)


def test_the_table_is_printed_and_the_users_folder_is_left_alone(done: tuple[Path, str]) -> None:
    folder, output = done
    assert {file.name for file in folder.iterdir()} == {"params.yaml", "found.json", "found.md"}
    assert output.strip() == (folder / "found.md").read_text().strip()
    for name in METHODS:
        assert f"| {name} | fast |" in output


def test_an_unknown_variant_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    run = bench(tmp_path, "--variants", "fast", "faster")
    assert run.returncode != 0
    assert "need variants of plain, fast, layout, attention" in run.stderr
    assert "got faster" in run.stderr
    same = bench(tmp_path, "--variants", "fast+fp32", "fast")
    assert "need variants that differ, got fast+fp32 and fast" in same.stderr


def test_a_switch_differs_from_plain_by_itself_alone(modules: None, tmp_path: Path) -> None:
    from variants import SWITCHES, known  # pyright: ignore[reportMissingImports]

    params = tiny_params(tmp_path, performance={"attention": "plain"})
    every = known(params)
    plain = vars(every["plain"].performance)
    for name in (*SWITCHES, "recompute"):
        others = {"norm": 2}.get(name, 1)  # it needs its layout
        changed = [key for key in plain if vars(every[name].performance)[key] != plain[key]]
        assert len(changed) == others, name
    assert every["fast"] == params
    recompute = Performance(attention="plain", recompute=(16,))
    assert every["fast+recompute"] == replace(params, performance=recompute)
    assert every["bf16"] == replace(every["plain"], precision="bf16")
    assert every["fast+bf16"] == replace(params, precision="bf16")


def test_the_floor_has_all_operations_that_are_counted_elsewhere(
    modules: None, tmp_path: Path
) -> None:
    from floor import REST, forward_traffic  # pyright: ignore[reportMissingImports]

    params = tiny_params(tmp_path)
    found = forward_traffic(params, batch=2)
    total, _ = forward_flops(build_denoiser(params), params)
    assert sum(flops for flops, _ in found.values()) == 2 * total
    assert found[REST][0] == 0
    more = forward_traffic(params, batch=4)
    for kind, (_, moved) in found.items():
        assert moved < more[kind][1] <= 2 * moved, "weights are read once, whatever the batch"


def test_what_runs_inside_a_part_is_not_counted_there(
    modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clock  # pyright: ignore[reportMissingImports]

    ticks = iter(range(100))
    monkeypatch.setattr(clock, "now", lambda device: torch.ones(2).numpy() * next(ticks))
    parts = clock.Parts(torch.device("cpu"))
    inner = parts.watched(lambda: None, "inner")
    with parts.part("outer"):  # 0 .. 5
        inner()  # 1 .. 2
        inner()  # 3 .. 4
    assert {name: seconds.tolist() for name, seconds in parts.seconds.items()} == {
        "outer": [3, 3],
        "inner": [2, 2],
    }


def test_speed_is_compared_pair_by_pair(modules: None) -> None:
    from clock import summary  # pyright: ignore[reportMissingImports]

    wall = {"plain": [2.0, 20.0, 3.0], "fast": [1.0, 10.0, 1.0]}  # the second pair was disturbed
    samples = {v: [torch.tensor([s, s]).numpy() for s in each] for v, each in wall.items()}
    about = {"baseline": "plain", "matmul_flops_per_second": {"fp32": 24.0, "bf16": 48.0}}
    about["variants"] = {"plain": {"precision": "fp32"}, "fast": {"precision": "bf16"}}
    found = summary(samples, 12, 3.0, about)
    assert [found[v]["utilisation"] for v in wall] == [0.5, 0.75], "12 images of 3 FLOPs"
    assert found["fast"]["speedup"] == 2.0
    assert found["fast"]["images_per_second"] == 12.0
    assert found["plain"]["seconds"] == 3.0
