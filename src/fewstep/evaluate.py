"""Generate images and score them: what the stages do after training, and validation during it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.data.batches import batch_indices
from fewstep.data.lmdb import ImageDataset
from fewstep.denoiser import ConditionalDenoise, Denoiser, guided, one_hot
from fewstep.distributed import Rank, gather, share
from fewstep.metrics.features import FeatureExtractor, extract, load_features
from fewstep.metrics.frechet import frechet_distance, gaussian_stats
from fewstep.params import Params, Row, Validation
from fewstep.sample import SeededNoise, sample, to_uint8

FEATURE_BATCH = 100


@torch.no_grad()
def generate_images(
    params: Params,
    row: Row,
    denoiser: ConditionalDenoise,
    seeds: Sequence[int],
    device: torch.device,
    done: Callable[[int], object] = lambda count: None,
    classes: Sequence[int] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of these seeds as a row samples them, uint8 (N, C, H, W), and their classes (N,).

    Args:
        done: called with the number of images of each finished batch.
        classes: of each image; None: as params.generate.labels says.

    Raises:
        FloatingPointError: an image is not finite.
    """
    d, n, batch = params.data, params.noise, params.generate.batch
    denoise = guided(denoiser, row.guidance_scale)
    images = np.empty((len(seeds), d.channels, d.resolution, d.resolution), np.uint8)
    found = np.empty(len(seeds), np.int64)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        noise = SeededNoise(part, images.shape[1:])
        latents, drawn = noise(), noise.labels(d.classes)
        balanced = torch.tensor(list(part)) % d.classes
        labels = balanced if params.generate.labels == "balanced" else drawn
        if classes is not None:
            labels = torch.tensor(classes[start : start + batch])
        x = sample(
            row.sampler,
            denoise,
            noise,
            latents.to(device),
            one_hot(labels, d.classes).to(device),
            row.steps,
            n.sigma_min,
            n.sigma_max,
            n.rho,
            asdict(row.churn) if row.churn else None,
        )
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(
                f"{row.model} gave images that are not finite: {row.sampler}, {row.steps} steps, "
                f"guidance_scale {row.guidance_scale}, seeds {part[0]} to {part[-1]}"
            )
        images[start : start + batch] = to_uint8(x).cpu().numpy()
        found[start : start + batch] = labels.numpy()
        done(len(part))
    return images, found


def real_images(dataset: ImageDataset, count: int) -> NDArray[np.int64]:
    """Which images a reference of `count` images is made of; the next ones are disjoint from it."""
    return batch_indices(0, count, len(dataset), seed=0)  # the reference does not hang on the seed


class Validator:
    """Scores a denoiser by the Fréchet distance of some of its images, on all ranks together.

    Raises:
        ValueError: the data have fewer images than the reference asks for.
    """

    def __init__(
        self, params: Params, settings: Validation, dataset: ImageDataset, rank: Rank
    ) -> None:
        if settings.reference_images > len(dataset):
            raise ValueError(
                f"need at most {len(dataset)} reference images, which {dataset.path} has, got "
                f"{settings.reference_images} (params.yaml: validation.reference_images)"
            )
        self.params, self.settings, self.rank = params, settings, rank
        self.extractor: FeatureExtractor = load_features(params.metric.features, rank.device)
        images, _ = dataset.read(share(real_images(dataset, settings.reference_images), rank))
        self.reference = gaussian_stats(self._features(images))

    def student(self, denoiser: Denoiser, name: str) -> tuple[float, NDArray[np.uint8]]:
        """Distance of the student's images, equal on all ranks, and this rank's share of them."""
        v = self.settings
        return self._score(denoiser, Row(name, v.sampler, v.steps, v.guidance_scale))

    def teacher(self, denoiser: Denoiser) -> float | None:
        """Distance of the teacher's images; None when the settings do not ask for it."""
        base = self.settings.teacher
        if base is None:
            return None
        return self._score(denoiser, Row("teacher", base.sampler, base.steps, 1.0))[0]

    def _score(self, denoiser: Denoiser, row: Row) -> tuple[float, NDArray[np.uint8]]:
        first, count = self.settings.first_seed, self.settings.images
        seeds = share(range(first, first + count), self.rank)
        was_training = denoiser.training
        images, _ = generate_images(self.params, row, denoiser.eval(), seeds, self.rank.device)
        denoiser.train(was_training)
        value = frechet_distance(gaussian_stats(self._features(images)), self.reference)
        return gather(value, self.rank)[0], images  # one answer, whatever each rank's rounding

    def _features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of all ranks' images, in their order."""
        mine = extract(self.extractor, images, FEATURE_BATCH)
        return np.concatenate(gather(mine, self.rank))
