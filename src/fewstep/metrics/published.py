"""Published reference statistics: mean and covariance of the features of real images."""

import os

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.arrays import open_arrays
from fewstep.metrics.frechet import GaussianStats, one_thread
from fewstep.quoting import printable

ASYMMETRY = 1e-5  # of the largest covariance: what float32 on the way would leave
# Of the largest eigenvalue. Features that depend on each other make eigenvalues of 0, which come
# out as 1e-16 of the largest in float64, and 1e-5 where sums were made in float32.
NEGATIVE = 1e-4
KEYS = ("mu", "sigma")


def published_stats(path: str | os.PathLike[str], dim: int) -> GaussianStats:
    """`mu` and `sigma` of an .npz file, as EDM publishes them (Karras et al. 2022, fid-refs).

    Args:
        path: the file; nothing in it is executed.
        dim: length d of the detector's feature vectors.

    Returns:
        Mean (d,) and covariance (d, d), float64; the count is 0, as the file does not record it.

    Raises:
        ValueError: another kind of file, another shape than the detector's, numbers that are not
            real or not finite, or a matrix that is not a covariance.
    """
    mean, cov = _arrays(path, dim)
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise _wrong(path, "finite mu and sigma", "NaN or infinity")
    # `eigh` would silently read only one triangle of a matrix that is not symmetric
    largest = np.abs(cov).max()
    if (odd := np.abs(cov - cov.T).max()) > ASYMMETRY * largest:
        raise _wrong(path, "a symmetric sigma", f"differences of {odd:.3g} across its diagonal")
    if (least := cov.diagonal().min()) < 0:
        raise _wrong(path, "variances >= 0 on the diagonal of sigma", f"{least:.3g}")
    with one_thread():
        values = torch.linalg.eigvalsh(torch.tensor((cov + cov.T) / 2)).numpy()
    if values[0] < -NEGATIVE * values[-1]:
        got = f"one of {values[0]:.3g} beside {values[-1]:.3g}: no covariance"
        raise _wrong(path, "eigenvalues >= 0 of sigma", got)
    return GaussianStats(mean, cov, 0)


def _arrays(
    path: str | os.PathLike[str], dim: int
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """mu and sigma, read once their shapes and types are those that are wanted."""
    try:
        with open_arrays(path) as arrays:
            if gone := [key for key in KEYS if key not in arrays]:
                raise ValueError(f"{gone[0]} is not in it")
            mean, cov = (arrays[key] for key in KEYS)
            if (mean.shape, cov.shape) == ((dim,), (dim, dim)) and mean.real and cov.real:
                return mean.read(), cov.read()
    except (OSError, ValueError) as error:
        raise _wrong(path, "an .npz file with mu and sigma", printable(str(error))) from error
    if not (mean.real and cov.real):
        raise _wrong(path, "real floating-point numbers", f"{mean.dtype} and {cov.dtype}")
    raise _wrong(
        path,
        f"mu ({dim},) and sigma ({dim}, {dim}), features of params.metric.features",
        f"{mean.shape} and {cov.shape}",
    )


def _wrong(path: str | os.PathLike[str], need: str, got: str) -> ValueError:
    return ValueError(
        f"need {need} as reference statistics, got {got} in {path} (params.yaml: metric.reference)"
    )
