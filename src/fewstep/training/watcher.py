"""The interface through which a training reports. Nothing a watcher does changes a number."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.distributed import Rank
from fewstep.method import Method
from fewstep.params import Params

Row = Mapping[str, Any]
LOG_ROWS = 200  # without tracking.log_rows


@dataclass(frozen=True)
class Watched:
    """What a watcher gets to see of a training that begins or resumes.

    Attributes:
        folder: the folder of its states, where a watcher may keep files of its own.
        snapshots: the folder of what stays beside the model.
        fingerprint: the hash of all that it depends on, 64 hex digits.
        nimg, total: images seen so far, and at the end.
        saved: what the watcher's `saved` returned for the state; None without a state.
    """

    name: str
    params: Params
    method: Method
    rank: Rank
    folder: Path
    snapshots: Path
    fingerprint: str
    nimg: int
    total: int
    saved: Mapping[str, Any] | None


class Watcher(AbstractContextManager["Watcher"]):
    """A watcher that does nothing, for trial steps and for all ranks but the first."""

    def begin(self, training: Watched) -> None:
        """The training begins or resumes."""

    def advance(self, images: int, text: str) -> None:
        """That many more images were seen; `text` is the latest loss, or empty."""

    def write(self, row: Row, times: Row | None = None) -> None:
        """A row of numbers with its nimg; `times` depend on the machine and its clock."""

    def show(self, images: NDArray[np.uint8], nimg: int) -> None:
        """Samples of the averaged student, (N, C, H, W)."""

    def saved(self) -> dict[str, Any]:
        """Put all rows on the disk and return JSON for a resumed training's `begin`."""
        return {}

    def finish(self, folder: Path) -> None:
        """The model is written to `folder`; add what belongs beside it."""

    def __exit__(self, *_: object) -> None:
        """The training is over, whether finished, stopped or failed."""
