"""Scores of a student during its training."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.data.lmdb import ImageDataset
from fewstep.distributed import Rank, gather
from fewstep.metrics.features import FeatureExtractor, extract_outputs, rank_images
from fewstep.metrics.frechet import GaussianStats, frechet_distance, gaussian_stats
from fewstep.metrics.reference import feature_network, published_reference, real_images
from fewstep.networks.denoiser import Denoiser
from fewstep.params import Baseline, Params, Row, Validation
from fewstep.sampling.batches import batches, generate_batches
from fewstep.theory.noise import Schedule


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
        self.dataset, self.rank = dataset, rank

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
        count, dataset = self.settings.reference_images, self.dataset
        if count > len(dataset):
            raise ValueError(
                f"need at most {len(dataset)} reference images, all that {dataset.path} has, got "
                f"{count} (params.yaml: validation.reference_images)"
            )
        places = real_images(dataset, count)
        return gaussian_stats(self._features(count, lambda mine: dataset.read(places[mine])[0]))

    def student(self, denoiser: Denoiser, name: str) -> tuple[float, NDArray[np.uint8]]:
        """Distance of the student's images, and the images; both are equal on all ranks."""
        v = self.settings
        return self._score(denoiser, Row(name, v.sampler, v.steps, v.guidance_scale), self.grid)

    def teacher(self, denoiser: Denoiser, how: Baseline) -> float:
        """Distance of the teacher's images."""
        row, grid = Row("teacher", how.sampler, how.steps, 1.0), Schedule.of(self.params.noise)
        return self._score(denoiser, row, grid)[0]

    def _score(
        self, denoiser: Denoiser, row: Row, grid: Schedule
    ) -> tuple[float, NDArray[np.uint8]]:
        was_training = denoiser.training
        images = self._images(denoiser.eval(), row, grid)
        denoiser.train(was_training)
        features = self._features(len(images), lambda mine: images[mine])
        value = frechet_distance(gaussian_stats(features), self.reference)
        # the first rank's value decides on the best state, even if GPUs of other kinds round apart
        return gather(value, self.rank)[0], images

    def _images(self, denoiser: Denoiser, row: Row, grid: Schedule) -> NDArray[np.uint8]:
        v, rank = self.settings, self.rank
        parts = batches(range(v.first_seed, v.first_seed + v.images), self.params.generate.batch)
        mine = parts[rank.index :: rank.world]
        made = generate_batches(self.params, row, denoiser, grid, mine, rank.device)
        found = dict(zip(mine, (images for images, _ in made), strict=True))
        everyone = {part: images for each in gather(found, rank) for part, images in each.items()}
        return np.concatenate([everyone[part] for part in parts])

    def _features(
        self, count: int, read: Callable[[slice], NDArray[np.uint8]]
    ) -> NDArray[np.float32]:
        """Features of all images on every rank; each is extracted on one of them."""
        mine = rank_images(count, self.rank.index, self.rank.world)
        images = [read(slice(mine.start, mine.stop))] if mine else []
        found = extract_outputs(self.extractor.outputs, images, workers=self.extractor.workers)
        parts = gather(found.get("features"), self.rank)
        return np.concatenate([part for part in parts if part is not None])
