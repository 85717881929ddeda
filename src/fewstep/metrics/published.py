"""Published reference statistics: mean and covariance of the features of real images."""

import os
import zipfile
import zlib

import numpy as np

from fewstep.metrics.frechet import GaussianStats

ASYMMETRY = 1e-5  # of the largest covariance: rounding if it was computed in float32
_UNREADABLE = (  # not a zip, a single array, a claim of terabytes, ...
    OSError, KeyError, EOFError, TypeError, ValueError, NotImplementedError, MemoryError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


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
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = file["mu"], file["sigma"]
    except _UNREADABLE as error:
        raise _wrong(path, "an .npz file with mu and sigma", str(error)) from error
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise _wrong(
            path,
            f"mu ({dim},) and sigma ({dim}, {dim}), features of params.metric.features",
            f"{mean.shape} and {cov.shape}",
        )
    if mean.dtype.kind != "f" or cov.dtype.kind != "f":
        raise _wrong(path, "real floating-point numbers", f"{mean.dtype} and {cov.dtype}")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise _wrong(path, "finite mu and sigma", "NaN or infinity")
    # `eigh` would silently read only one triangle of a matrix that is not symmetric
    largest = np.abs(cov).max()
    if (odd := np.abs(cov - cov.T).max()) > ASYMMETRY * largest:
        raise _wrong(path, "a symmetric sigma", f"differences of {odd:.3g} across its diagonal")
    if (least := cov.diagonal().min()) < 0:
        raise _wrong(path, "variances >= 0 on the diagonal of sigma", f"{least:.3g}")
    return GaussianStats(mean, cov, 0)


def _wrong(path: str | os.PathLike[str], need: str, got: str) -> ValueError:
    return ValueError(
        f"need {need} as reference statistics, got {got} in {path} (params.yaml: metric.reference)"
    )
