"""The time and memory that a training takes, for its log."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds and rates of training alone: validation, for one, is left out.

    Attributes:
        before: seconds of the processes that trained before a restart.
    """

    def __init__(self) -> None:
        self.before, self.nimg = 0.0, 0
        self.started = self.lap_started = time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def here(self) -> float:
        """Seconds of this process alone."""
        return time.monotonic() - self.started

    def lap(self, nimg: int) -> float:
        """Images per second since the last lap, which ended at an earlier nimg; begins the next."""
        now = time.monotonic()
        rate = (nimg - self.nimg) / max(now - self.lap_started, 1e-9)
        self.lap_started, self.nimg = now, nimg
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self.started, self.lap_started = self.started + spent, self.lap_started + spent


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far, on the GPU or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
