"""What a method logs of a loss: sums and counts on the device; log rows show their ratios.

Sums and counts add up over steps and ranks, which means would not if the counts differ.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Logged = tuple[Tensor, Tensor]
"""Sums and their divisors, float64, both scalars or both (G,) for G groups."""


def mean_of(values: Tensor, mask: Tensor | None = None) -> Logged:
    """Mean of all values, or of those selected by a mask of the same shape."""
    values = values.detach().double()
    if mask is None:
        return values.sum(), torch.full((), values.numel(), device=values.device).double()
    return torch.where(mask, values, 0.0).sum(), mask.double().sum()


def by_group(values: Tensor, group: Tensor, groups: int) -> Logged:
    """Mean of the values (B,) in each group, given the group numbers (B,)."""
    members = F.one_hot(group, groups).double()
    # `where`, not a product: a NaN in one group would turn 0 * NaN into NaN in all others.
    sums = torch.where(members > 0, values.detach().double()[:, None], 0.0).sum(dim=0)
    return sums, members.sum(dim=0)


SIGMA_BOUNDS = (0.0, 0.1, 1.0, 10.0, float("inf"))


def by_sigma(name: str, values: Tensor, sigma: Tensor) -> dict[str, Logged]:
    """Means of the values (B,) in four ranges of noise levels (B,)."""
    return {
        f"sigma/{name}_{low:g}_to_{high:g}": mean_of(values, (sigma >= low) & (sigma < high))
        for low, high in pairwise(SIGMA_BOUNDS)
    }
