"""Images a second of what is no training step: sampling, features, LMDB, the Fréchet distance."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from clock import faster, in_turn, seconds_of, summary
from stand import random_source

from fewstep.data.lmdb import ImageDataset, build_lmdb
from fewstep.data.order import batch_indices
from fewstep.metrics.features import FeatureExtractor, extract_outputs, load_features
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.metrics.inception import Inception
from fewstep.networks.compute import accelerate
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_model
from fewstep.params import Params, Row
from fewstep.planning.flops import forward_flops
from fewstep.sampling.batches import batches, generate_batches
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import nfe
from fewstep.training.stopwatch import peak_memory

CPU = torch.device("cpu")
CPU_BATCH = 64  # images of a sampler's batch there, at most: more would only take longer
LMDB_IMAGES, LMDB_SHAPE = 4096, (3, 64, 64)
READ = 256  # images of a batch
FEATURE_IMAGES = 200


def kinds(params: Params) -> dict[str, Row]:
    """One row of each sampler, number of steps and guidance: whose weights it is costs the same."""
    rows: dict[str, Row] = {}
    for row in params.rows.values():
        guided = "" if row.guidance_scale == 1 else " guided"
        rows.setdefault(f"{row.sampler} {row.steps}{guided}", replace(row, model="teacher"))
    return rows


def sampled_at_once(params: Params, device: torch.device) -> int:
    """Images of a sampler's batch."""
    batch = params.generate.batch
    return min(batch, CPU_BATCH) if device.type == "cpu" else batch


def generation(
    params: Params,
    variants: Mapping[str, Params],
    device: torch.device,
    pairs: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Rates of each kind of row and each variant, on a batch of the sampler."""
    networks, own, batch = {}, dict[str, int](), sampled_at_once(params, device)
    # a GPU has the second batch while the first is read back
    parts = batches(range(batch if device.type == "cpu" else 2 * batch), batch)
    images = sum(map(len, parts))
    for variant, how in variants.items():
        denoiser, _ = load_model("teacher", how)
        before = _held(device)
        networks[variant] = accelerate(denoiser.to(device), how.performance, frozen=True)
        own[variant] = _held(device) - before
    flops, _ = forward_flops(build_denoiser(params), params)
    found, grid = {}, Schedule.of(params.noise)
    for kind, row in kinds(params).items():
        actions = {
            v: partial(_consume, generate_batches, params, row, n, grid, parts, device)
            for v, n in networks.items()
        }
        peaks = {v: _peak(action, device) for v, action in actions.items()}  # compilation, too
        calls = nfe(row.sampler, row.steps, row.guidance_scale)
        each = summary(in_turn(actions, pairs, device), images, calls * flops, about)
        for variant, peak in peaks.items():
            others = sum(own.values()) - own[variant]  # a GPU holds all networks at once
            each[variant]["memory_gib"] = (peak - others) / 2**30
        found[kind] = {
            "images": images,
            "nfe": calls,
            "flops_per_image": calls * flops,
            "variants": each,
        }
    return found


def one_call(params: Params, device: torch.device, pairs: int) -> dict[str, float]:
    """Two batches in one network call, as guidance and the discriminator have them, against two."""
    denoiser = accelerate(load_model("teacher", params)[0].to(device), params.performance, True)
    d, half = params.data, sampled_at_once(params, device)
    x = torch.randn(2 * half, d.channels, d.resolution, d.resolution, device=device)
    sigma, labels = torch.ones(2 * half, device=device), torch.zeros(2 * half, d.classes).to(device)
    whole = (x, sigma, labels)
    calls = {"one": [whole], "two": list(zip(*(t.chunk(2) for t in whole), strict=True))}
    actions = {name: partial(_call, denoiser, inputs) for name, inputs in calls.items()}
    in_turn(actions, 1, device)
    samples = in_turn(actions, pairs, device)
    wall, cpu = faster(samples["two"], samples["one"])
    return {"images": half, "speedup": wall, "cpu_speedup": cpu}


@torch.no_grad()
def _call(denoiser: Denoiser, each: list[tuple[torch.Tensor, ...]]) -> None:
    for inputs in each:
        denoiser(*inputs)


def feature_network(params: Params, device: torch.device) -> FeatureExtractor:
    """The preset's, or Inception-2015 with random weights where it names others to download."""
    if params.metric.weights is None:
        return load_features(params.metric.features, device)
    network = Inception().eval().requires_grad_(False).to(device)
    return FeatureExtractor("inception-2015, random", "random", 2048, "", network, device)


def feature_rates(
    params: Params, device: torch.device, repeats: int, count: int = FEATURE_IMAGES
) -> dict[str, Any]:
    """Features of random images, and the distance between two sets of random features."""
    extractor, d = feature_network(params, device), params.data
    shape = (count, d.channels, d.resolution, d.resolution)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    how = {"workers": extractor.workers, "chunk": extractor.chunk}
    extract = partial(extract_outputs, extractor.outputs, **how)
    extract([images])
    rows = np.random.default_rng(1).standard_normal((2, extractor.dim + 100, extractor.dim))
    stats = [gaussian_stats(each) for each in rows]
    return {
        "network": extractor.name,
        "dim": extractor.dim,
        "images": count,
        "extraction": _rate(lambda: extract([images]), count, device, repeats),
        "statistics": _rate(lambda: gaussian_stats(rows[0]), len(rows[0]), CPU, repeats),
        "distance_seconds": _median(lambda: frechet_distance(*stats), CPU, repeats),
    }


def data_rates(repeats: int) -> dict[str, Any]:
    """Building an LMDB of 64x64x3 images with labels, and reading random batches of it."""
    file, source = Path("rates.lmdb"), random_source(LMDB_IMAGES, LMDB_SHAPE, 1000)
    build = partial(build_lmdb, source, file, silent=True)
    built = _rate(build, LMDB_IMAGES, CPU, min(repeats, 3))
    dataset = ImageDataset(file)
    places = [batch_indices(n, READ, LMDB_IMAGES, 0) for n in range(0, LMDB_IMAGES, READ)]

    def read() -> None:
        for indices in places:
            for array in dataset.read(indices):
                torch.from_numpy(array)

    read()
    found = {"build": built, "random_read": _rate(read, LMDB_IMAGES, CPU, repeats)}
    file.unlink()
    return found


def _held(device: torch.device) -> int:
    """Bytes of tensors on a GPU now; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(action: Callable[[], object], device: torch.device) -> int:
    """Most bytes held while the action runs; on a CPU, since this process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds_of(action, device)
    return peak_memory(device)


def _consume(make: Callable[..., Iterator[Any]], *arguments: Any) -> None:  # noqa: ANN401
    for _ in make(*arguments):
        pass


def _median(action: Any, device: torch.device, repeats: int) -> list[float]:  # noqa: ANN401
    samples = [seconds_of(action, device) for _ in range(repeats)]
    return [median(float(s[clock]) for s in samples) for clock in (0, 1)]


def _rate(action: Any, images: int, device: torch.device, repeats: int) -> dict[str, float]:  # noqa: ANN401
    wall, cpu = _median(action, device, repeats)
    return {"images_per_second": images / wall, "images_per_cpu_second": images / cpu}
