"""Generate images and score them: what the stages do after training, and validation during it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.batches import batch_indices
from fewstep.data.lmdb import ImageDataset
from fewstep.denoiser import ConditionalDenoise, Denoiser, guided, one_hot
from fewstep.distributed import Rank, gather, to_device
from fewstep.download import CACHE, fetch
from fewstep.metrics.features import (
    FeatureExtractor,
    extract_outputs,
    load_features,
    rank_images,
)
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats
from fewstep.metrics.reference import published_stats
from fewstep.params import Params, Row, Validation
from fewstep.sample import SeededNoise, sample, to_uint8

Seeds = TypeVar("Seeds", range, list[int])
Images = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""A batch of images (B, C, H, W) and their classes (B,)."""


@torch.no_grad()
def generate_batches(
    params: Params,
    row: Row,
    denoiser: ConditionalDenoise,
    parts: Iterable[Sequence[int]],
    device: torch.device,
    classes: Iterable[int] | None = None,
) -> Iterator[Images]:
    """The images of each batch of seeds as a row samples them, and their classes.

    A GPU has the next batch to work on before the images of one are waited for.

    Args:
        classes: of each image; None: as params.generate.labels says.

    Raises:
        FloatingPointError: an image is not finite.
    """
    d, n = params.data, params.noise
    denoise = guided(denoiser, row.guidance_scale)
    given, launched = iter(classes or ()), deque[tuple[Sequence[int], Tensor, Tensor]]()
    for part in parts:
        noise = SeededNoise(part, (d.channels, d.resolution, d.resolution), device)
        latents, drawn = noise(), noise.labels(d.classes)
        balanced = torch.tensor(list(part)) % d.classes
        labels = balanced if params.generate.labels == "balanced" else drawn
        if classes is not None:
            labels = torch.tensor(list(islice(given, len(part))))
        x = sample(
            row.sampler,
            denoise,
            noise,
            latents,
            to_device(one_hot(labels, d.classes), device),
            row.steps,
            n.sigma_min,
            n.sigma_max,
            n.rho,
            asdict(row.churn) if row.churn else None,
        )
        launched.append((part, labels, x))
        if device.type == "cpu" or len(launched) > 1:
            yield _finished(row, *launched.popleft())
    for last in launched:
        yield _finished(row, *last)


def _finished(row: Row, seeds: Sequence[int], labels: Tensor, x: Tensor) -> Images:
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(
            f"{row.model} gave images that are not finite: {row.sampler}, {row.steps} steps, "
            f"guidance_scale {row.guidance_scale}, seeds {seeds[0]} to {seeds[-1]}"
        )
    return to_uint8(x).cpu().numpy(), labels.numpy()


def real_images(dataset: ImageDataset, count: int) -> NDArray[np.int64]:
    """Which images a reference of `count` images is made of; the next ones are disjoint from it."""
    return batch_indices(0, count, len(dataset), seed=0)  # the reference does not hang on the seed


def feature_network(params: Params, device: torch.device) -> FeatureExtractor:
    """The network of params.metric, its weights fetched where they are not here yet."""
    m = params.metric
    if m.weights is None:
        return load_features(m.features, device)
    file = fetch(m.weights.url, m.weights.sha256, CACHE, key="metric.weights")
    return load_features(m.features, device, file, m.weights.sha256)


def published_reference(params: Params, extractor: FeatureExtractor) -> GaussianStats | None:
    """The statistics of params.metric.reference, fetched where they are not here yet; or None.

    Raises:
        ValueError: another sha256, or statistics that do not fit the network.
    """
    if (r := params.metric.reference) is None:
        return None
    file = fetch(r.url, r.sha256, CACHE, key="metric.reference")
    return published_stats(file, extractor.dim)


def batches(seeds: Seeds, batch: int) -> list[Seeds]:
    """Seeds that are sampled together: the same ones whatever ranks share them."""
    return [seeds[start : start + batch] for start in range(0, len(seeds), batch)]


class Validator:
    """Scores a denoiser by the Fréchet distance of some of its images, on all ranks together.

    Ranks share whole batches of images and whole chunks of features, and all have the same ones
    of both in the end: the score is the same, bit for bit, on any number of them. The reference is
    that of params.metric.reference, as in a row's score, or else the settings' images.

    Raises:
        ValueError: the data have fewer images than the reference asks for.
    """

    def __init__(
        self, params: Params, settings: Validation, dataset: ImageDataset, rank: Rank
    ) -> None:
        self.params, self.settings, self.rank = params, settings, rank
        self.extractor = feature_network(params, rank.device)
        published = published_reference(params, self.extractor)
        self.reference = published or gaussian_stats(self._real(dataset))

    def _real(self, dataset: ImageDataset) -> NDArray[np.float32]:
        """Features of the reference images."""
        settings = self.settings
        if settings.reference_images > len(dataset):
            raise ValueError(
                f"need at most {len(dataset)} reference images, which {dataset.path} has, got "
                f"{settings.reference_images} (params.yaml: validation.reference_images)"
            )
        places = real_images(dataset, settings.reference_images)
        return self._features(len(places), lambda mine: dataset.read(places[mine])[0])

    def student(self, denoiser: Denoiser, name: str) -> tuple[float, NDArray[np.uint8]]:
        """Distance of the student's images, and the images; equal on all ranks."""
        v = self.settings
        return self._score(denoiser, Row(name, v.sampler, v.steps, v.guidance_scale))

    def teacher(self, denoiser: Denoiser) -> float | None:
        """Distance of the teacher's images; None when the settings do not ask for it."""
        base = self.settings.teacher
        if base is None:
            return None
        return self._score(denoiser, Row("teacher", base.sampler, base.steps, 1.0))[0]

    def _score(self, denoiser: Denoiser, row: Row) -> tuple[float, NDArray[np.uint8]]:
        was_training = denoiser.training
        images = self._images(denoiser.eval(), row)
        denoiser.train(was_training)
        features = self._features(len(images), lambda mine: images[mine])
        value = frechet_distance(gaussian_stats(features), self.reference)
        return gather(value, self.rank)[0], images  # one answer on GPUs of several kinds, too

    def _images(self, denoiser: Denoiser, row: Row) -> NDArray[np.uint8]:
        v, rank = self.settings, self.rank
        parts = batches(range(v.first_seed, v.first_seed + v.images), self.params.generate.batch)
        mine = parts[rank.index :: rank.world]
        made = generate_batches(self.params, row, denoiser, mine, rank.device)
        found = dict(zip(mine, (images for images, _ in made), strict=True))
        everyone = {part: images for each in gather(found, rank) for part, images in each.items()}
        return np.concatenate([everyone[part] for part in parts])

    def _features(
        self, count: int, read: Callable[[slice], NDArray[np.uint8]]
    ) -> NDArray[np.float32]:
        """Features of all images, each extracted on one rank; on every rank."""
        mine = rank_images(count, self.rank.index, self.rank.world)
        images = [read(slice(mine.start, mine.stop))] if mine else []
        found = extract_outputs(self.extractor.outputs, images, workers=self.extractor.workers)
        parts = gather(found.get("features"), self.rank)
        return np.concatenate([part for part in parts if part is not None])
