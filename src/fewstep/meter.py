"""Means of logged values, summed on the device: nothing waits for it until a row is written."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.distributed import Rank, gather, sum_over_ranks

Logged = tuple[Tensor, Tensor]
"""Sums and what to divide them by, float64, both scalars or both (G,) for G groups."""


def mean_of(values: Tensor, mask: Tensor | None = None) -> Logged:
    """Mean of all values, or of those under a mask of their shape."""
    values = values.detach().double()
    if mask is None:
        return values.sum(), torch.full((), values.numel(), device=values.device).double()
    return torch.where(mask, values, 0.0).sum(), mask.double().sum()


def by_group(values: Tensor, group: Tensor, groups: int) -> Logged:
    """Mean of the values (B,) of each group, whose number `group` (B,) says."""
    members = F.one_hot(group, groups).double()
    sums = torch.where(members > 0, values.detach().double()[:, None], 0.0).sum(dim=0)
    return sums, members.sum(dim=0)


SIGMA_BOUNDS = (0.0, 0.1, 1.0, 10.0, float("inf"))


def by_sigma(name: str, values: Tensor, sigma: Tensor) -> dict[str, Logged]:
    """Means of the values (B,) at four ranges of noise levels (B,)."""
    return {
        f"sigma/{name}_{low:g}_to_{high:g}": mean_of(values, (sigma >= low) & (sigma < high))
        for low, high in pairwise(SIGMA_BOUNDS)
    }


class Meter:
    """Sums and counts of what was logged since the last row."""

    def __init__(self, sums: Mapping[str, Logged] | None = None) -> None:
        self.sums = dict(sums or {})

    def add(self, values: Mapping[str, Logged]) -> None:
        for name, (total, count) in values.items():
            if name in self.sums:
                before = self.sums[name]
                total, count = before[0] + total, before[1] + count
            self.sums[name] = (total, count)

    def over_ranks(self, rank: Rank) -> "Meter":
        """The sums of all ranks together, of what any of them counted; every rank gets the same."""
        mine = {name: total.shape for name, (total, _) in self.sums.items()}
        shapes = {name: shape for each in gather(mine, rank) for name, shape in each.items()}
        like = {"dtype": torch.float64, "device": rank.device}
        pairs = {name: torch.zeros(2, *shape, **like) for name, shape in shapes.items()}
        pairs |= {name: torch.stack(pair) for name, pair in self.sums.items()}
        if not pairs:
            return Meter()
        flat = sum_over_ranks(torch.cat([pair.flatten() for pair in pairs.values()]), rank)
        parts = flat.split([pair.numel() for pair in pairs.values()])
        sums = [part.view_as(pair) for part, pair in zip(parts, pairs.values(), strict=True)]
        return Meter({name: (pair[0], pair[1]) for name, pair in zip(pairs, sums, strict=True)})

    def means(self) -> dict[str, float]:
        """Mean of each of which something was counted; group g of a name is name_g."""
        found: dict[str, float] = {}
        for name, (totals, counts) in self.sums.items():
            pairs = zip(totals.reshape(-1).tolist(), counts.reshape(-1).tolist(), strict=True)
            for g, (total, count) in enumerate(pairs):
                if count:
                    found[f"{name}_{g}" if totals.ndim else name] = total / count
        return found

    def state(self) -> dict[str, Any]:
        """For `Meter.restore`, as JSON says it."""
        return {name: [part.tolist() for part in pair] for name, pair in self.sums.items()}

    @classmethod
    def restore(cls, state: Mapping[str, Any], device: torch.device) -> "Meter":
        def tensor(values: float | list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return cls({name: (tensor(total), tensor(count)) for name, (total, count) in state.items()})


def readable(values: Mapping[str, float]) -> dict[str, float | str]:
    """For a row of JSON: six digits, and a string for NaN and infinity, which JSON cannot say."""
    return {
        name: float(f"{value:.6g}") if math.isfinite(value) else str(value)
        for name, value in values.items()
    }
