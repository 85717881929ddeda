"""Signs of mode seeking, beside the distance of a validation.

A student that gives up modes draws fewer kinds of images: its recall and the spread of its pixels
fall, while the distance may still improve. Distillation with too much guidance or GAN drifts to
brighter or darker images first.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNS = ("recall", "brightness", "std_ratio")
K = 3  # the neighbour that the balls of recall reach to, as published
_PART = 1024  # images at a time, whose squares need eight times their memory


@dataclass(frozen=True)
class PixelSums:
    """Sums over images, exact in any order and on any number of ranks.

    Attributes:
        count: number of images, at least 2.
        total, squares: int64 (C, H, W), of grey levels from 0 to 255 and of their squares.
    """

    count: int
    total: NDArray[np.int64]
    squares: NDArray[np.int64]

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> "PixelSums":
        """Those of images (N, C, H, W)."""
        total = np.zeros(images.shape[1:], np.int64)
        squares = np.zeros_like(total)
        for start in range(0, len(images), _PART):
            part = images[start : start + _PART].astype(np.int64)
            total += part.sum(axis=0)
            squares += np.square(part).sum(axis=0)
        return cls(len(images), total, squares)

    def __add__(self, other: "PixelSums") -> "PixelSums":
        sums = self.total + other.total, self.squares + other.squares
        return PixelSums(self.count + other.count, *sums)

    @property
    def brightness(self) -> float:
        """Mean of all pixels: 0 is black, 1 white."""
        return float(self.total.mean()) / (255 * self.count)

    @property
    def spread(self) -> float:
        """Standard deviation of a pixel over the images, mean over pixels and channels."""
        n = self.count
        variance = (n * self.squares - self.total**2) / (n * (n - 1))
        return float(np.sqrt(variance).mean())


def std_ratio(images: PixelSums, real: PixelSums) -> float | None:
    """Spread of images over that of real ones; below 1 they look alike. None if real ones do too.

    A ratio of means, not a mean of ratios: a pixel that is black in nearly all images, as in the
    corners of Fashion-MNIST, would have a ratio of noise, or 0 / 0.
    """
    return images.spread / real.spread if real.spread else None
