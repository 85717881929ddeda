"""A micro-batch and its place on the training clock, which determines all its randomness."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings, unrelated for different parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # manual_seed takes a signed 64-bit integer


@dataclass
class Batch:
    """Images of one micro-batch and the generators that draw its noise.

    Attributes:
        images: float32 in [-1, 1], (B, C, H, W).
        labels: one-hot float32, (B, classes).
        nimg: position of the first image on the clock.
        step_nimg: position of the first image of the global batch, over all ranks.
        seed: the run's seed.
        others: as many images and labels in each of the `other_images` unrelated orders of the
            data that the method asks for.
    """

    images: Tensor
    labels: Tensor
    nimg: int
    step_nimg: int
    seed: int
    others: Sequence[tuple[Tensor, Tensor]] = ()

    def __post_init__(self) -> None:
        device = self.images.device
        seed = derived_seed(self.seed, self.nimg)
        self.cpu_generator = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(device).manual_seed(seed + 1)
        self.dropout_seed = seed + 2
        # one draw for the global batch: from step_nimg, and on the CPU, so that all ranks agree
        self.shared_generator = torch.Generator().manual_seed(
            derived_seed(self.seed, self.step_nimg, "shared")
        )

    @property
    def kimg(self) -> float:
        return self.step_nimg / 1000

    def other_images(self, order: int = 0) -> tuple[Tensor, Tensor]:
        assert order < len(self.others), "need a method that asks for other_images"
        return self.others[order]

    def normal_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)

    def normal(self) -> Tensor:
        """A standard normal number for each image, (B,)."""
        device = self.images.device
        return torch.randn(len(self.images), device=device, generator=self.generator)

    def uniform(self) -> Tensor:
        """A number in [0, 1) for each image, (B,)."""
        device = self.images.device
        return torch.rand(len(self.images), device=device, generator=self.generator)

    def uniform_ints(self, low: int, high: int, count: int | None = None) -> Tensor:
        """An integer in [low, high) for each image, or `count` of them, (B,)."""
        shape, device = (count or len(self.images),), self.images.device
        return torch.randint(low, high, shape, device=device, generator=self.generator)

    def keep_labels(self, drop: float) -> Tensor:
        """A column (B, 1) of ones and, with probability `drop`, zeros."""
        shape, device = (len(self.images), 1), self.images.device
        return (torch.rand(shape, device=device, generator=self.generator) >= drop).float()
