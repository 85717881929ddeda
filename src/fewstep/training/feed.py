"""The batches of a training, as a function of nimg alone; the next one is read ahead."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fewstep.data.batch import Batch, derived_seed
from fewstep.data.lmdb import ImageDataset
from fewstep.data.order import batch_indices
from fewstep.distributed import Rank, to_device
from fewstep.networks.denoiser import one_hot
from fewstep.params import Student, key_of

Rows = tuple[Tensor, Tensor]
"""Pixels, uint8 (B, C, H, W), and labels, int64 (B,), on the CPU."""


def check_world(name: str, block: Student, world: int) -> int:
    """Micro-batches per batch for each of `world` processes.

    Raises:
        ValueError: they cannot be shared evenly.
    """
    rounds = block.batch // block.batch_gpu
    if rounds % world:
        fits = ", ".join(str(n) for n in range(1, rounds + 1) if rounds % n == 0)
        raise ValueError(
            f"need a number of processes that divides batch / batch_gpu = {rounds}, got "
            f"{world}; {fits} would (params.yaml: {key_of(name)}.batch_gpu)"
        )
    return rounds // world


class Feed:
    """This rank's micro-batches of each batch; a thread reads the next batch during training.

    Args:
        batch, batch_gpu: images in a batch over all ranks, and in a micro-batch.
        total: images in the whole training, after which nothing is read.
        other_images: also read as many images in each of so many unrelated orders.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch: int,
        batch_gpu: int,
        total: int,
        seed: int,
        rank: Rank,
        other_images: int = 0,
    ) -> None:
        self.dataset, self.batch, self.batch_gpu, self.total = dataset, batch, batch_gpu, total
        self.rank, self.seed = rank, seed
        more = [derived_seed(seed, "another order", *range(1, i + 1)) for i in range(other_images)]
        self.orders = [seed, *more]
        self.thread = ThreadPoolExecutor(1, "feed")
        self.ahead: tuple[int, Future[list[list[Rows]]]] | None = None

    def __call__(self, nimg: int) -> list[Batch]:
        """The micro-batches at nimg, on the device; begins to read those that follow.

        Raises:
            ValueError: an image cannot be read.
        """
        ahead = self.ahead
        rows = ahead[1].result() if ahead and ahead[0] == nimg else self.read(nimg)
        following = nimg + self.batch
        if following < self.total:
            self.ahead = following, self.thread.submit(self.read, following)
        return [
            self._micro_batch(first, nimg, orders)
            for first, orders in zip(self.places(nimg), rows, strict=True)
        ]

    def places(self, nimg: int) -> range:
        """The nimg at which each of this rank's micro-batches of the batch at nimg begins."""
        every = range(nimg, nimg + self.batch, self.batch_gpu)
        return every[self.rank.index :: self.rank.world]

    def read(self, nimg: int) -> list[list[Rows]]:
        """The rows of this rank's micro-batches, for each micro-batch in each order."""
        return [[self._rows(first, seed) for seed in self.orders] for first in self.places(nimg)]

    def _rows(self, first: int, seed: int) -> Rows:
        indices = batch_indices(first, self.batch_gpu, len(self.dataset), seed)
        pixels, labels = (torch.from_numpy(a) for a in self.dataset.read(indices))
        if self.rank.device.type == "cuda":
            pixels, labels = pixels.pin_memory(), labels.pin_memory()  # here, off the main thread
        return pixels, labels

    def _micro_batch(self, first: int, nimg: int, orders: list[Rows]) -> Batch:
        own, *others = [self._on_device(*rows) for rows in orders]
        return Batch(*own, first, nimg, self.seed, others)

    def _on_device(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], (B, C, H, W), and one-hot labels, (B, classes)."""
        device = self.rank.device
        images = to_device(pixels, device).float() / 127.5 - 1
        return images, one_hot(to_device(labels, device), self.dataset.classes)
