"""Means of logged values. They are summed on the device, so only writing a row waits for it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.distributed import Rank, gather, sum_over_ranks
from fewstep.logs import Logged


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
        """The sums over all ranks, on every rank, of all that any rank logged."""
        # names differ between ranks, since a rank may not have drawn some step or kind of edge
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
        """Means of all values that were counted at least once; group g of a name is name_g."""
        found: dict[str, float] = {}
        for name, (totals, counts) in self.sums.items():
            pairs = zip(totals.reshape(-1).tolist(), counts.reshape(-1).tolist(), strict=True)
            for g, (total, count) in enumerate(pairs):
                if count:
                    found[f"{name}_{g}" if totals.ndim else name] = total / count
        return found

    def state(self) -> dict[str, Any]:
        """The sums and counts as JSON, exactly; for `Meter.restore`."""
        return {name: [part.tolist() for part in pair] for name, pair in self.sums.items()}

    @classmethod
    def restore(cls, state: Mapping[str, Any], device: torch.device) -> "Meter":
        def tensor(values: float | list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return cls({name: (tensor(total), tensor(count)) for name, (total, count) in state.items()})


def readable(values: Mapping[str, float]) -> dict[str, float | str]:
    """Values for a row of JSON: six digits, and strings for NaN and infinity, which JSON lacks."""
    return {
        name: float(f"{value:.6g}") if math.isfinite(value) else str(value)
        for name, value in values.items()
    }
