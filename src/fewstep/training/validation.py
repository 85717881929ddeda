"""Scores of a student during its training."""

from collections.abc import Callable
from functools import cached_property, reduce
from operator import add
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank, gather
from fewstep.metrics.features import CHUNK, FeatureExtractor, extract_outputs, rank_images
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats
from fewstep.metrics.manifold import recall
from fewstep.metrics.reference import KEPT, feature_network, published_reference, real_images
from fewstep.networks.denoiser import Denoiser
from fewstep.params import Baseline, Params, Row, Validation
from fewstep.sampling.batches import batches, compile_once, generate_batches
from fewstep.theory.noise import Schedule
from fewstep.training.signs import K, PixelSums, std_ratio


class Score(NamedTuple):
    """What a validation finds: the distance, the images behind it, and signs of mode seeking."""

    value: float
    images: NDArray[np.uint8]
    signs: dict[str, float]


class Validator:
    """Scores a denoiser by the Fréchet distance of some of its images, on all ranks together.

    Ranks share whole batches of images and whole chunks of features, and exchange both. So the
    score is the same, bit for bit, on any number of ranks. The reference is that of a row's score,
    params.metric.reference, or else images of the data. It and the feature network are loaded on
    first use.

    Args:
        settings: None for a training without validation, which never asks for a score.
        grid: on which the student is sampled.
    """

    def __init__(
        self,
        params: Params,
        settings: Validation | None,
        grid: Schedule,
        dataset: ImageDataset,
        rank: Rank,
    ) -> None:
        self.params, self._settings, self.grid = params, settings, grid
        self.dataset, self.rank, self.compiled = dataset, rank, set[str]()

    @property
    def settings(self) -> Validation:
        assert self._settings is not None, "without validation, nothing is scored"
        return self._settings

    @cached_property
    def extractor(self) -> FeatureExtractor:
        with torch.random.fork_rng([]):  # building it draws initial weights
            return feature_network(self.params, self.rank.device)

    @property
    def label(self) -> str:
        """The name of the distance."""
        return self.extractor.label

    @cached_property
    def reference(self) -> GaussianStats:
        """Statistics of the images to compare with.

        Raises:
            ValueError: the data have fewer images than the settings ask for.
        """
        if published := published_reference(self.params, self.extractor):
            return published
        return gaussian_stats(self.real_features)

    @cached_property
    def real_features(self) -> NDArray[np.float32]:
        """Features of the images to compare with, where no published statistics are.

        Raises:
            ValueError: the data have fewer images than the settings ask for.
        """
        count, dataset = self.settings.reference_images, self.dataset
        if count > len(dataset):
            raise ValueError(
                f"need at most {len(dataset)} reference images, all that {dataset.path} has, got "
                f"{count} (params.yaml: validation.reference_images)"
            )
        places = real_images(dataset, count)
        return self._features(count, lambda mine: dataset.read(places[mine])[0])

    @cached_property
    def real_pixels(self) -> PixelSums:
        """Of as many real images, or of all."""
        count = min(self.settings.reference_images, len(self.dataset))
        mine = np.array_split(real_images(self.dataset, count), self.rank.world)[self.rank.index]
        parts = (mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK))
        own = [PixelSums.of(self.dataset.read(part)[0]) for part in parts]
        return reduce(add, (sums for each in gather(own, self.rank) for sums in each))

    def student(self, denoiser: Denoiser, name: str) -> Score:
        """The score of the student, equal on all ranks."""
        v = self.settings
        return self._score(denoiser, Row(name, v.sampler, v.steps, v.guidance_scale), self.grid)

    def teacher(self, denoiser: Denoiser, how: Baseline) -> Score:
        """The score of the teacher."""
        row, grid = Row("teacher", how.sampler, how.steps, 1.0), Schedule.of(self.params.noise)
        return self._score(denoiser, row, grid)

    def _score(self, denoiser: Denoiser, row: Row, grid: Schedule) -> Score:
        was_training = denoiser.training
        images = self._images(denoiser.eval(), row, grid)
        denoiser.train(was_training)
        features = self._features(len(images), lambda mine: images[mine])
        value = frechet_distance(gaussian_stats(features), self.reference)
        # the first rank's value decides on the best state, even if GPUs of other kinds round apart
        return Score(gather(value, self.rank)[0], images, self._signs(images, features))

    def _signs(self, images: NDArray[np.uint8], features: NDArray[np.float32]) -> dict[str, float]:
        """Recall, where there are features of real images, brightness, ratio of spreads."""
        pixels, found = PixelSums.of(images), dict[str, float]()
        if self.params.metric.reference is None and len(images) > K:
            found["recall"] = recall(self.real_features[:KEPT], features, K, self.rank.device)
        found["brightness"] = pixels.brightness
        if (ratio := std_ratio(pixels, self.real_pixels)) is not None:
            found["std_ratio"] = ratio
        return found

    def _images(self, denoiser: Denoiser, row: Row, grid: Schedule) -> NDArray[np.uint8]:
        v, rank = self.settings, self.rank
        parts = batches(range(v.first_seed, v.first_seed + v.images), self.params.generate.batch)
        mine = parts[rank.index :: rank.world]
        if row.model not in self.compiled:
            compile_once(denoiser, self.params, row, len(parts[0]), rank)
            self.compiled.add(row.model)
        made = generate_batches(self.params, row, denoiser, grid, mine, rank.device)
        found = dict(zip(mine, (images for images, _ in made), strict=True))
        everyone = {part: images for each in gather(found, rank) for part, images in each.items()}
        return np.concatenate([everyone[part] for part in parts])

    def _features(
        self, count: int, read: Callable[[slice], NDArray[np.uint8]]
    ) -> NDArray[np.float32]:
        """Features of all images on every rank; each is extracted on one of them."""
        extractor, rank = self.extractor, self.rank
        mine = rank_images(count, rank.index, rank.world, extractor.chunk)
        images = [read(slice(mine.start, mine.stop))] if mine else []
        workers, chunk = extractor.workers, extractor.chunk
        found = extract_outputs(extractor.outputs, images, workers=workers, chunk=chunk)
        parts = gather(found.get("features"), self.rank)
        return np.concatenate([part for part in parts if part is not None])
