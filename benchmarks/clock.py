"""Seconds of wall and processor; of nested parts, each without those inside; variants in turn."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
"""Of wall and processor (2,): the second does not see what else the machine does."""


def now(device: torch.device) -> Seconds:
    """The clocks, when the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return np.array([time.perf_counter(), time.process_time()])


def seconds_of(action: Callable[[], object], device: torch.device) -> Seconds:
    began = now(device)
    action()
    return now(device) - began


def in_turn(
    actions: Mapping[str, Callable[[], object]], pairs: int, device: torch.device
) -> dict[str, list[Seconds]]:
    """Seconds of each action, A B A B ...: what disturbs one of a pair disturbs the other."""
    found: dict[str, list[Seconds]] = {name: [] for name in actions}
    for _ in range(pairs):
        for name, action in actions.items():
            found[name].append(seconds_of(action, device))
    return found


def faster(baseline: list[Seconds], mine: list[Seconds]) -> list[float]:
    """By what factor, of wall and of processor: medians over pairs."""
    ratios = [base / own for base, own in zip(baseline, mine, strict=True)]
    return [median(float(ratio[clock]) for ratio in ratios) for clock in (0, 1)]


def summary(
    samples: dict[str, list[Seconds]], images: int, flops: float, about: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Of each variant: median seconds, images/s, the speed-up over the baseline by pairs, and the
    share of the matrix product's rate that images of `flops` each come to."""
    found, baseline, rates = {}, about["baseline"], about["matmul_flops_per_second"]
    for name, mine in samples.items():
        speedup, cpu_speedup = faster(samples[baseline], mine)
        wall, cpu = (median(float(s[clock]) for s in mine) for clock in (0, 1))
        found[name] = {
            "seconds": wall,
            "cpu_seconds": cpu,
            "images_per_second": images / wall,
            "utilisation": images / wall * flops / rates[about["variants"][name]["precision"]],
            "speedup": speedup,
            "cpu_speedup": cpu_speedup,
            "samples": [s.tolist() for s in mine],
        }
    return found


class Parts:
    """Seconds of named parts; what runs inside another part counts for the inner one alone."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stack = device, list[str]()
        self.seconds: dict[str, Seconds] = defaultdict(lambda: np.zeros(2))
        self.since = np.zeros(2)

    def _charge(self) -> None:
        time = now(self.device)
        if self.stack:
            self.seconds[self.stack[-1]] += time - self.since
        self.since = time

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self.stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self.stack.pop()

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:  # noqa: ANN401
            with self.part(name):
                return function(*args, **named)

        return timed
