"""How fast this code is, and where the time goes: `make bench`, or `python benchmarks --help`.

stand.py      a folder with everything that a preset needs, made of random numbers
variants.py   the ways of computing that are compared
clock.py      seconds of wall and processor, by part; A B A B ...
steps.py      a training step of each method, whole and split into its parts
rates.py      generation, features, LMDB, Fréchet distance
ingest.py     build-lmdb on PNGs in a zip, and what ImageNet takes
table.py      the JSON as Markdown
gpu_check.py  apart from these: all of it in five minutes of a GPU, with the CUDA tests
gpu_run.sh    apart from these: a whole preset on one GPU, without DVC
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ingest import ingest_rates
from rates import data_rates, feature_rates, generation, one_call
from stand import prepare, random_inputs
from steps import methods, training
from table import markdown
from variants import chosen

from fewstep.distributed import pick_device
from fewstep.files import write_json
from fewstep.params import Params, load_params
from fewstep.planning.flops import matmul_rate
from fewstep.report.provenance import this_run

RESULTS = Path(__file__).parent / "results"
IMAGES = 50_000
PARTS = ("training", "generation", "features", "data")


def main() -> None:
    options = arguments()
    preset = load_params(options.preset)
    if preset.device == "cuda":  # of presets for GPUs; what is here is measured all the same
        preset = replace(preset, device="auto")
    what = (Path(options.preset).stem, preset.precision, str(pick_device(preset.device)))
    out = (options.out or RESULTS / f"{'-'.join(what)}.json").resolve()
    begun = {"preset": str(options.preset), "command": command(options), **this_run()}
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # what a training writes goes there, whatever the user's folders hold
        try:
            found = begun | measure(prepare(preset, options.batch), options)
        finally:
            os.chdir(out.parents[0] if out.parent.is_dir() else Path(__file__).parent)
    write_json(out, found)
    text = markdown(found)
    out.with_suffix(".md").write_text(text)
    print(text)


def measure(params: Params, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for; the matrix product first, on the same device."""
    device = pick_device(params.device)
    variants = chosen(options.variants, params)
    precisions = {how.precision for how in variants.values()}
    found: dict[str, Any] = {
        "device": device.type,
        "precision": params.precision,
        "threads": torch.get_num_threads(),
        "pairs": options.pairs,
        "baseline": options.variants[-1],
        "variants": {
            name: {"precision": how.precision, **vars(how.performance)}
            for name, how in variants.items()
        },
        "matmul_flops_per_second": {p: matmul_rate(device, p) for p in sorted(precisions)},
    }
    random_inputs(params)
    if "training" in options.parts:
        found["training"] = {}
        for name in methods(params, options.methods):
            say(f"training {name}")
            found["training"][name] = training(name, variants, device, options.pairs, found)
    if "generation" in options.parts:
        say("generation")
        found["generation"] = generation(params, variants, device, options.pairs, found)
        found["one_call"] = one_call(params, device, options.pairs)
    if "features" in options.parts:
        say("features")
        found["features"] = feature_rates(params, device, options.pairs)
    if "data" in options.parts:
        say("data")
        found["data"] = data_rates(options.pairs)
        say("build-lmdb")
        found["data"]["ingest"] = ingest_rates(options.images)
    return found


def say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python benchmarks", description=__doc__)
    add = parser.add_argument
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add("preset", nargs="?", default="params.yaml", help="a params file; default params.yaml")
    add("--variants", nargs="+", default=["fast", "plain"], help="the last is the baseline")
    add("--pairs", type=int, default=7, help="measurements of each variant; default 7")
    add("--batch", type=int, help="images of a step and of a sampler's batch; default the preset's")
    add("--images", type=int, default=IMAGES, help=f"PNGs for build-lmdb; default {IMAGES}")
    add("--methods", nargs="+", help="students to train; default all")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    add(
        "--out",
        type=Path,
        help="JSON file; default benchmarks/results/PRESET-PRECISION-DEVICE.json",
    )
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """What gives these numbers again."""
    words = [f"make bench PRESET={options.preset} VARIANTS='{' '.join(options.variants)}'"]
    extra = [f"--pairs {options.pairs}"] if options.pairs != 7 else []
    extra += [f"--batch {options.batch}"] if options.batch else []
    extra += [f"--images {options.images}"] if options.images != IMAGES else []
    extra += [f"--methods {' '.join(options.methods)}"] if options.methods else []
    extra += [f"--parts {' '.join(options.parts)}"] if options.parts != PARTS else []
    return " ".join(words + ([f"OPTIONS='{' '.join(extra)}'"] if extra else []))


if __name__ == "__main__":
    main()
