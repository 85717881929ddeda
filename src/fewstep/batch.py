"""A micro-batch with its place on the training clock, from which all its randomness follows."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from any integers and strings; unrelated for unequal parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _nothing_more() -> tuple[Tensor, Tensor]:
    raise ValueError("need a batch that knows more data, got one of its own images alone")


@dataclass
class Batch:
    """Images of one micro-batch and the generators that draw its noise.

    Attributes:
        images: float32 in [-1, 1], (B, C, H, W).
        labels: one-hot float32, (B, classes).
        nimg: position of the first image on the clock.
        step_nimg: position of the first image of the whole (all ranks') batch.
        seed: the run's seed.
        another: gives as many images and labels from another order of the data, unrelated to these.
        memory: what one phase of a method leaves for the next.
    """

    images: Tensor
    labels: Tensor
    nimg: int
    step_nimg: int
    seed: int
    another: Callable[[], tuple[Tensor, Tensor]] = _nothing_more
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.images.device
        seed = derived_seed(self.seed, self.nimg)
        self.cpu_generator = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(device).manual_seed(seed + 1)
        self.dropout_seed = seed + 2
        self.shared_generator = torch.Generator().manual_seed(
            derived_seed(self.seed, self.step_nimg, "shared")
        )

    @property
    def kimg(self) -> float:
        return self.step_nimg / 1000

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal images of x's shape and type."""
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)

    def uniform_ints(self, low: int, high: int) -> Tensor:
        """Integers in [low, high), one an image, (B,)."""
        shape, device = (len(self.images),), self.images.device
        return torch.randint(low, high, shape, device=device, generator=self.generator)

    def keep_labels(self, drop: float) -> Tensor:
        """A column (B, 1) of ones and, with probability `drop`, zeros."""
        shape, device = (len(self.images), 1), self.images.device
        return (torch.rand(shape, device=device, generator=self.generator) >= drop).float()
