"""A micro-batch and its place on the training clock, which determines all its randomness."""

import hashlib
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
        other: as many images and labels in an unrelated order of the data, for methods that set
            `other_images`.
    """

    images: Tensor
    labels: Tensor
    nimg: int
    step_nimg: int
    seed: int
    other: tuple[Tensor, Tensor] | None = None

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

    def other_images(self) -> tuple[Tensor, Tensor]:
        assert self.other is not None, "need a method that asks for other_images"
        return self.other

    def normal_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)

    def uniform_ints(self, low: int, high: int) -> Tensor:
        """An integer in [low, high) for each image, (B,)."""
        shape, device = (len(self.images),), self.images.device
        return torch.randint(low, high, shape, device=device, generator=self.generator)

    def keep_labels(self, drop: float) -> Tensor:
        """A column (B, 1) of ones and, with probability `drop`, zeros."""
        shape, device = (len(self.images), 1), self.images.device
        return (torch.rand(shape, device=device, generator=self.generator) >= drop).float()
