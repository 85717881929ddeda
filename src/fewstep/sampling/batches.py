"""Images in batches, from seeds, classes and the sampler of a row."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.distributed import Rank, one_of_node_first, to_device, to_host
from fewstep.networks.denoiser import one_hot
from fewstep.params import Generate, Params, Row
from fewstep.params.described import Described
from fewstep.theory.guidance import guided
from fewstep.theory.noise import Schedule
from fewstep.theory.sample import SeededNoise, sample, to_uint8
from fewstep.theory.solve import ConditionalDenoise

Seeds = TypeVar("Seeds", range, list[int])
Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""A batch of images (B, C, H, W) and their classes (B,)."""

Made = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""What waits for a batch: whether it is finite, and its images as uint8 (B, C, H, W)."""


@torch.no_grad()
def generate_batches(
    params: Described,
    row: Row,
    denoiser: ConditionalDenoise,
    grid: Schedule,
    parts: Iterable[Sequence[int]],
    device: torch.device,
    classes: Iterable[int] | None = None,
) -> Iterator[Images]:
    """Sample each batch of seeds as the row says; yield its images and classes.

    On a GPU, a batch is yielded after the next one is launched, and only that batch is waited for:
    saving one then overlaps with sampling the other.

    Args:
        grid: the schedule that the row's steps cut; of the model, `Schedule.of_model`.
        classes: the class of each image; None for the policy of params.generate.labels.

    Raises:
        FloatingPointError: an image is not finite.
    """
    d, sigmas = params.data, grid.nodes(row.steps)
    denoise = guided(denoiser, row.guidance_scale)
    given, launched = iter(classes or ()), deque[tuple[Sequence[int], Tensor, Made]]()
    for part in parts:
        noise = SeededNoise(part, (d.channels, d.resolution, d.resolution), device)
        # labels are always drawn, so that what the sampler draws does not depend on the policy
        count = max(d.classes, 1)  # without classes every label is 0, and no network sees it
        latents, drawn = noise(), noise.labels(count)
        balanced = torch.tensor(list(part)) % count
        labels = balanced if params.generate.labels == "balanced" else drawn
        if classes is not None:
            labels = torch.tensor(list(islice(given, len(part))))
        rows = to_device(one_hot(labels, d.classes), device)
        churn = asdict(row.churn) if row.churn else None
        x = sample(row.sampler, denoise, noise, latents, rows, sigmas, churn)
        launched.append((part, labels, (to_host(x.isfinite().all()), to_host(to_uint8(x)))))
        if device.type == "cpu" or len(launched) > 1:
            yield _finished(row, *launched.popleft())
    for last in launched:
        yield _finished(row, *last)


def _finished(row: Row, seeds: Sequence[int], labels: Tensor, made: Made) -> Images:
    finite, images = made
    if not bool(finite()):
        raise FloatingPointError(
            f"{row.model} gave images that are not finite: {row.sampler}, {row.steps} steps, "
            f"guidance_scale {row.guidance_scale}, seeds {seeds[0]} to {seeds[-1]}"
        )
    return images().numpy(), labels.numpy()


@torch.no_grad()
def compile_once(
    denoiser: ConditionalDenoise, params: Params, row: Row, count: int, rank: Rank
) -> None:
    """Let one process of each node compile what batches of `count` images of that row need.

    Several that compile the same kernels at once take far longer than one.
    """
    if rank.world == 1 or params.performance.compile == "none":
        return
    d, n = params.data, count * (1 if row.guidance_scale == 1 else 2)
    x = torch.zeros(n, d.channels, d.resolution, d.resolution, device=rank.device)
    with one_of_node_first(rank):  # the others find its kernels on the disk
        denoiser(x, x.new_ones(n), x.new_zeros(n, d.classes))


def seed_ranges(generate: Generate, row: Row) -> list[range]:
    """The row's disjoint ranges of seeds, one after the other; all rows share the first."""
    count = row.seed_ranges or generate.seed_ranges or 1
    starts = (generate.first_seed + generate.images * i for i in range(count))
    return [range(start, start + generate.images) for start in starts]


def batches(seeds: Seeds, batch: int) -> list[Seeds]:
    """Seeds to sample together. They do not depend on the number of ranks, nor does rounding."""
    return [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
