"""Distances between many feature vectors, and nearest neighbours, in blocks that fit in memory."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = 1e-12  # d sums of float64, d = 2048, lose up to 2.3e-13 each
BLOCK = 4096  # rows and columns of a block: 128 MiB of distances
Device = torch.device | str


def distance_blocks(
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    device: Device = "cpu",
    centre: NDArray[np.float64] | None = None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Euclidean distances between the rows of a and of b, block by block.

    From |x|^2 + |y|^2 - 2 x.y in float64, x and y as seen from the centre: the squares are wrong by
    less than ROUNDING of |x|^2 + |y|^2, and equal rows come out within 1e-7 of their length.

    Args:
        a, b: features, shapes (m, d) and (n, d).
        centre: (d,), which the distances do not depend on but their rounding does; None: b's mean.

    Yields:
        Rows of a, rows of b, their distances, float64 on `device`; row by row of blocks.
    """
    middle = _on(device, b.mean(axis=0, dtype=np.float64) if centre is None else centre)
    for rows in _slices(len(a)):
        x = _on(device, a[rows]) - middle
        for columns in _slices(len(b)):
            y = _on(device, b[columns]) - middle
            # scipy's cdist, from differences, takes 4 (d = 112) to 9 times (2048) as long on a CPU
            squared = (x @ y.T).mul_(-2).add_(x.square().sum(1)[:, None]).add_(y.square().sum(1))
            yield rows, columns, squared.clamp_(min=0).sqrt_()


def nearest(
    queries: NDArray[np.floating],
    references: NDArray[np.floating],
    k: int,
    device: Device = "cpu",
    skip: NDArray[np.integer] | None = None,
    centre: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest references of each query.

    Args:
        queries, references: features, shapes (m, d) and (n, d), n > k.
        skip: of each query, the reference that does not count, as it is the query itself: (m,).
        centre: as for `distance_blocks`.

    Returns:
        Distances, nearest first, and indices into references, both (m, k).
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for rows, columns, distances in distance_blocks(queries, references, device, centre):
        if skip is not None:
            _skip(distances, torch.from_numpy(skip[rows] - columns.start).to(device))
        near, index = distances.topk(min(k, distances.shape[1]), largest=False)
        index += columns.start
        if rows.start in found:
            near = torch.cat([found[rows.start][0], near], 1)
            index = torch.cat([found[rows.start][1], index], 1)
        order = near.argsort(dim=1, stable=True)[:, :k]
        found[rows.start] = near.gather(1, order), index.gather(1, order)
    values, indices = (
        torch.cat(parts).cpu().numpy() for parts in zip(*found.values(), strict=True)
    )
    return values, indices


def _skip(distances: Tensor, columns: Tensor) -> None:
    """Set one column of each row to infinity, if the block has that column."""
    rows = torch.nonzero((columns >= 0) & (columns < distances.shape[1])).flatten()
    distances[rows, columns[rows]] = torch.inf


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _on(device: Device, rows: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device, torch.float64)
