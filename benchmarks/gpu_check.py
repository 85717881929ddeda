"""What a GPU does with this code, in five minutes: `python benchmarks/gpu_check.py`.

Parts, the most wanted first; each is a process of its own with a limit of its own, so that one that
fails or hangs does not take the others with it:

matrix      what is installed here, and the rates of a matrix product that all else is a share of
steps       a training step of each method, `plain` (as an eager loop computes it) and `fast`,
            which is the preset's `performance` but for `compile`
generation  a batch of each kind of row, in the same two ways
features    features of 10,000 random images, their statistics, and a Fréchet distance
tests       pytest -m cuda: equality, exact resumption, quiet steps, graphs, NCCL, gloo
compiled    steps and generation with `fast+compile-blocks`; compiling takes most of it
tuned       steps with `fast+cudnn-benchmark`, which finds on the disk what `compiled` compiled
slow-tests  those of the CUDA tests that compile, too

It needs torch, pytest and the packages of pyproject.toml but for dvc, dvclive, wandb and snakemake.
Where they are in a folder, carried along: PYTHONPATH=src:FOLDER python benchmarks/gpu_check.py.

Each measurement is a JSON file in --out as soon as it is made. table.md there, made anew after each
part and printed at the end, is of all of them, also of those of an earlier call. `--parts compiled`
measures that alone. utilisation.csv has lines for src/fewstep/planning/utilisation.csv, from which
`fewstep plan` tells how long trainings take.
"""

import argparse
import contextlib
import csv
import gc
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rates import feature_rates, generation
from stand import prepare, random_inputs
from steps import methods, training
from table import table
from variants import chosen

from fewstep.distributed import pick_device
from fewstep.files import read_json, write_json
from fewstep.networks.compute import missing_for_compiling
from fewstep.params import Params, load_params
from fewstep.paths import DATA, MODELS
from fewstep.planning.flops import matmul_rate
from fewstep.planning.plan import GPUS
from fewstep.planning.utilisation import kind_of
from fewstep.report.provenance import commit

ROOT = Path(__file__).resolve().parents[1]
PRESET = ROOT / "config" / "imagenet64.yaml"
EAGER, COMPILED = ("plain", "fast+no-compile"), ("fast+compile-blocks",)
TUNED = ("fast+cudnn-benchmark",)
LIMITS = {  # seconds of each part
    "matrix": 30,
    "steps": 110,
    "generation": 60,
    "features": 45,
    "tests": 90,
    "compiled": 240,
    "tuned": 120,
    "slow-tests": 180,
}
BUDGET = 300  # seconds of all parts


def main() -> None:
    o = arguments()
    os.environ.setdefault("FEWSTEP_COMMIT", own_commit())
    o.out = o.out.resolve()
    o.out.mkdir(parents=True, exist_ok=True)
    if o.only:
        return only(o)
    end, notes = time.monotonic() + o.budget, dict[str, str]()
    for part in o.parts:
        left = end - time.monotonic()
        limit = min(LIMITS[part] * o.slower, left)
        notes[part] = in_process(part, limit) if left > 5 else "no time left"
        print(f"gpu_check: {part}: {notes[part]}", file=sys.stderr, flush=True)
        write(o.out, notes)  # after each part: whoever lends the GPU may end this early
    shutil.rmtree(o.out / "work", ignore_errors=True)  # random data and weights
    print((o.out / "table.md").read_text())


def write(out: Path, notes: dict[str, str]) -> None:
    """The table of all that was measured so far, and what else is made of it."""
    write_json(out / "parts.json", notes)
    write_shares(out)
    (out / "table.md").write_text("\n".join(lines(out, notes)) + "\n")


def own_commit() -> str:
    """The commit of this checkout, wherever the program is started."""
    with contextlib.chdir(ROOT):
        return commit() or "unknown"


def in_process(part: str, limit: float) -> str:
    """Measure a part by this program in a process of its own; how that ended, and its seconds."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--only", part], start_new_session=True
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:  # also where a Ctrl-C ends this program
        if process.poll() is None:
            os.killpg(process.pid, 9)  # its compilers, too
            process.wait()
    seconds = f"{time.monotonic() - began:.0f} s"
    return f"done in {seconds}" if code == 0 else f"failed (exit status {code}) in {seconds}"


def only(o: argparse.Namespace) -> None:
    """Measure one part, here; exit with 1 if any of its measurements failed."""
    if o.only in ("tests", "slow-tests"):
        return run_tests(o)
    preset = load_params(o.preset)
    params = prepare(replace(preset, device="auto"), o.batch)
    work = o.out / "work"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    device = pick_device(params.device)
    if o.only == "matrix":
        write_json(o.out / "matrix.json", matrix(params, device))
        return
    if not (MODELS / "teacher" / "model.json").exists() or not DATA.exists():
        random_inputs(params)
    bench = Bench(o, params, device)
    parts: dict[str, Callable[[], None]] = {
        "steps": partial(bench.steps, EAGER),
        "generation": partial(bench.generation, EAGER),
        "features": bench.features,
        "tuned": partial(bench.steps, TUNED),
        "compiled": lambda: (bench.steps(COMPILED), bench.generation(COMPILED)) and None,
    }
    parts[o.only]()
    sys.exit(bench.failed)


def matrix(params: Params, device: torch.device) -> dict[str, Any]:
    """The machine, and its rates."""
    precisions = sorted({params.precision, "fp32"} | ({"tf32"} if device.type == "cuda" else set()))
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": os.environ["FEWSTEP_COMMIT"],
        "date": time.strftime("%Y-%m-%d"),
        "missing for compiling": missing_for_compiling(device.type == "cpu"),
        "matmul_flops_per_second": {p: matmul_rate(device, p) for p in precisions},
    }
    if device.type == "cuda":
        found["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return found


class Bench:
    """Measurements of a preset, each written as a JSON file when it is made.

    Attributes:
        failed: whether one of them failed; the next ones were made all the same.
    """

    def __init__(self, o: argparse.Namespace, params: Params, device: torch.device) -> None:
        self.o, self.params, self.device, self.failed = o, params, device, False
        self.rates = {params.precision: matmul_rate(device, params.precision)}

    def about(self, variant: str, how: Params) -> dict[str, Any]:
        """What `clock.summary` asks for: each variant is its own baseline, and `lines` compares."""
        own = {"precision": how.precision, **vars(how.performance)}
        return {
            "preset": Path(self.o.preset).stem,
            "commit": os.environ["FEWSTEP_COMMIT"],
            "baseline": variant,
            "variants": {variant: own},
            "matmul_flops_per_second": self.rates,
        }

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Write what `work` finds, or how it failed, and free the device for the next one."""
        began = time.monotonic()
        try:
            found = work()
        except Exception as error:  # of any kind: the next measurement may work
            self.failed = True
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        write_json(self.o.out / f"{name}.json", {**found, "took": time.monotonic() - began})
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def steps(self, variants: tuple[str, ...]) -> None:
        for name in methods(self.params, self.o.methods):
            if name == "teacher":
                continue
            for variant, how in chosen(list(variants), self.params).items():
                about = self.about(variant, how)
                work = partial(training, name, {variant: how}, self.device, self.o.pairs, about)
                kept = {"settings": about, "method": self.params.students[name].method}
                self.measure(
                    f"step-{name}-{variant}",
                    lambda w=work, k=kept, n=name: {**k, "measured": {n: w()}},
                )

    def generation(self, variants: tuple[str, ...]) -> None:
        short = {f"{r.sampler} {r.steps}": (n, r) for n, r in self.params.rows.items()}
        rows = {n: r for n, r in short.values() if r.steps <= self.o.most_steps}
        params = replace(self.params, rows=rows)
        for variant, how in chosen(list(variants), params).items():
            about = self.about(variant, how)
            work = partial(generation, params, {variant: how}, self.device, self.o.pairs, about)
            self.measure(
                f"generation-{variant}",
                lambda w=work, a=about: {"settings": a, "method": "generation", "measured": w()},
            )

    def features(self) -> None:
        work = partial(feature_rates, self.params, self.device, 1, self.o.images)
        self.measure("features", work)


def run_tests(o: argparse.Namespace) -> None:
    """The CUDA tests, or those of them that take minutes; pytest's last lines as JSON."""
    which = "cuda and slow" if o.only == "slow-tests" else "cuda and not slow"
    command = [sys.executable, "-m", "pytest", "-vv", "-m", which, "-p", "no:cacheprovider"]
    command += ["--tb=short", "-W", "ignore", "--show-capture=no", "-rfE"]
    command += o.tests or cuda_files()
    carried = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(ROOT / "src"), *map(os.path.abspath, carried)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    (o.out / f"{o.only}.json").unlink(missing_ok=True)  # of an earlier call
    with (o.out / f"{o.only}.txt").open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env=environ, stdout=file, stderr=file).returncode
    said = (o.out / f"{o.only}.txt").read_text().splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    write_json(o.out / f"{o.only}.json", {"summary": said[-1:], "failed": failed, "code": code})
    sys.exit(code not in (0, 5))  # 5: none was chosen


def cuda_files() -> list[str]:
    """The files with CUDA tests; others may import what a lent machine lacks, such as DVC."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "pytest.mark.cuda" in file.read_text()]


def stopped_tests(said: str) -> str:
    """How far the tests came whose process was ended."""
    counts = {word: said.count(f" {word}") for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    begun = [line.split()[0] for line in said.splitlines() if "::" in line]
    last = f", the last begun: {begun[-1]}" if begun else ""
    return ", ".join(f"{n} {word.lower()}" for word, n in counts.items() if n or not last) + last


def lines(out: Path, notes: dict[str, str]) -> Iterator[str]:
    """All that is in the folder, as Markdown."""
    found = {file.stem: read_json(file) for file in sorted(out.glob("*.json"))}
    machine = found.get("matrix", {})
    if "device" in machine:
        rates = machine["matmul_flops_per_second"].items()
        each = ", ".join(f"{p} {rate / 1e12:.4g}" for p, rate in rates)
        yield f"{machine['device']}, torch {machine['torch']}, commit {machine['commit'][:12]}, "
        yield f"{machine['date']}. Matrix product, TFLOP/s: {each}."
        if machine["missing for compiling"]:
            yield f"Nothing can be compiled: {machine['missing for compiling']} is missing."
    head = ["method", "of", "variant", "images/s", "utilisation", "× plain", "memory GiB"]
    yield from ["", *table(head, _rows(found)), ""]
    if "extraction" in (features := found.get("features", {})):
        rate = features["extraction"]["images_per_second"]
        seconds = features["distance_seconds"][0]
        yield f"Features of {features['images']:,} images, {features['network']}: {rate:,.0f}/s. "
        yield f"A Fréchet distance in {features['dim']} dimensions: {seconds:.3g} s."
    for name in ("tests", "slow-tests"):
        if name in found:
            yield f"{name}: {' '.join(found[name]['summary'])}"
            yield from found[name]["failed"]
        elif (text := out / f"{name}.txt").exists():
            yield f"{name}: stopped; {stopped_tests(text.read_text())}"
    yield from (f"{name}: {f['error']}" for name, f in found.items() if "error" in f)
    yield from (f"Part {part}: {note}." for part, note in notes.items())


def write_shares(out: Path) -> None:
    """What was measured as lines for the table of `fewstep plan`, if it knows this GPU."""
    found = {file.stem: read_json(file) for file in sorted(out.glob("*.json"))}
    machine = found.get("matrix", {})
    gpu = kind_of(machine.get("device", ""), GPUS)
    if gpu is None:
        return
    source = f"benchmarks/gpu_check.py, {machine['commit'][:12]}, {machine['date']}"
    with (out / "utilisation.csv").open("w", newline="") as file:
        csv.writer(file).writerows(shares(found, gpu, source))


def shares(found: dict[str, Any], gpu: str, source: str) -> list[list[str]]:
    """Lines of the table, of what presets have: neither of `plain` nor of what is only tried.

    Of several students of a method, and of rows, the slowest counts.
    """
    least: dict[tuple[str, str], float] = {}
    for each, _, variant, cell in _cells(found):
        own = each["settings"]["variants"][variant]
        if variant != "plain" and variant not in TUNED:
            share = cell["flops_per_second"] / GPUS[gpu].flops[own["precision"]]
            key = each["method"], own["compile"]
            least[key] = min(share, least.get(key, 1.0))
    return [[gpu, *key, f"{share:.3f}", "measured", source] for key, share in least.items()]


def _cells(found: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, dict[str, Any]]]:
    """Of each measurement its file, what was measured, the variant, and the numbers."""
    for each in found.values():
        for what, row in each.get("measured", {}).items():
            for variant, cell in row["variants"].items():
                rate = cell["images_per_second"] * row["flops_per_image"]
                yield each, what, variant, {**cell, "flops_per_second": rate}


def _rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each measured variant of a step or sampler."""
    cells = {(each["method"], what, variant): cell for each, what, variant, cell in _cells(found)}
    for (method, what, variant), cell in sorted(cells.items()):
        base = cells.get((method, what, "plain"), {}).get("images_per_second")
        ratio = f"{cell['images_per_second'] / base:.2f}" if base else ""
        memory = f"{cell['memory_gib']:.1f}" if "memory_gib" in cell else ""
        rate = f"{cell['images_per_second']:.4g}"
        yield [method, what, variant, rate, f"{cell['utilisation']:.1%}", ratio, memory]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python benchmarks/gpu_check.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-check"), help="folder; default gpu-check")
    add("--preset", type=Path, default=PRESET, help="a params file; default imagenet64's")
    add("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="default all")
    add("--methods", nargs="+", help="students to train a step of; default all")
    add("--pairs", type=int, default=3, help="measurements of each; default 3")
    add("--batch", type=int, help="images of a step and of a sampler's batch; default the preset's")
    add("--images", type=int, default=10_000, help="for the features; default 10000")
    add("--most-steps", type=int, default=10, help="rows of more steps are left out; default 10")
    add("--tests", nargs="+", help="files of tests; default all with CUDA tests")
    add("--budget", type=float, default=BUDGET, help=f"seconds of all parts; default {BUDGET}")
    add("--slower", type=float, default=1, help="factor of the parts' limits, for a CPU")
    add("--only", choices=LIMITS, help=argparse.SUPPRESS)  # of the processes that it starts
    parsed = parser.parse_args()
    parsed.preset = parsed.preset.resolve()
    return parsed


if __name__ == "__main__":
    main()
