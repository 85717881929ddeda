"""Maximum mean discrepancy of two samples under a kernel (Gretton et al. 2012, JMLR 13)."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Features = NDArray[np.floating]
Kernel = Callable[[Matrix, Matrix], Matrix]

ROWS = 4096  # of a block of the kernel matrix: at most 128 MiB


def cubic_kernel(x: Matrix, y: Matrix) -> Matrix:
    """KID's kernel, (x.y / d + 1)^3 of every pair of rows: (m, d), (n, d) -> (m, n)."""
    root = x @ y.T / x.shape[1] + 1
    return root * root * root  # ten times as fast as `** 3`


def gaussian_kernel(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1 of every pair of rows.

    The -1 cancels in every discrepancy. Without it, a sigma far above the distances, as in CMMD,
    would leave few significant digits.
    """

    def kernel(x: Matrix, y: Matrix) -> Matrix:
        # 3 (d = 112) to 10 (d = 2048) times as fast as scipy's cdist, and equal to 1e-15
        squared = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
        return np.expm1(-squared.clip(min=0) / (2 * sigma**2))

    return kernel


def unbiased_mmd2(x: Features, y: Features, kernel: Kernel) -> float:
    """Unbiased squared discrepancy, Gretton et al. eq. 3; it can be negative.

    Args:
        x, y: shapes (m, d) and (n, d), m and n at least 2; converted to float64.
    """
    return _mean_of_others(x, kernel) + _mean_of_others(y, kernel) - 2 * _mean(x, y, kernel)


def biased_mmd2(x: Features, y: Features, kernel: Kernel) -> float:
    """Squared discrepancy of the two empirical distributions, Gretton et al. eq. 5; never < 0."""
    return _mean(x, x, kernel) + _mean(y, y, kernel) - 2 * _mean(x, y, kernel)


def _mean(x: Features, y: Features, kernel: Kernel) -> float:
    total = sum(float(block.sum()) for _, _, block in _blocks(x, y, kernel))
    return total / (len(x) * len(y))


def _mean_of_others(x: Features, kernel: Kernel) -> float:
    """Mean of the kernel over pairs of different rows."""
    total = 0.0
    for i, j, block in _blocks(x, x, kernel):
        total += float(block.sum() - (block.trace() if i == j else 0))
    return total / (len(x) * (len(x) - 1))


def _blocks(x: Features, y: Features, kernel: Kernel) -> Iterator[tuple[int, int, Matrix]]:
    """The kernel matrix piece by piece: first row, first column, piece."""
    for i in range(0, len(x), ROWS):
        for j in range(0, len(y), ROWS):
            rows, columns = x[i : i + ROWS], y[j : j + ROWS]
            yield i, j, kernel(rows.astype(np.float64), columns.astype(np.float64))
