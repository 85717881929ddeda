"""Resumable training state: everything but the frozen teacher, in one safetensors file a save.

It lives in a scratch folder whose name holds a fingerprint of what the training depends on, so a
state of other params or other data is never continued.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fewstep.files import atomic_path
from fewstep.models import read_safetensors

SCRATCH = Path("scratch")
DIGITS = 12  # of the fingerprint, in names
FINISHED = "finished"


def flatten_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors named by parameter number and quantity."""
    return {
        f"{number}/{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `flatten_optimizer`; hyperparameters stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    # asked of the base class: a sharded optimiser tells its state only after it was collected
    optimizer.load_state_dict({**Optimizer.state_dict(optimizer), "state": state})


class Checkpoints:
    """The newest states of one training, and the one with the best validation.

    A state is copied at once and written by a thread, while training goes on.

    Attributes:
        stall: seconds that training waited for its states.
    """

    def __init__(self, name: str, fingerprint: str, keep: int) -> None:
        self.name, self.fingerprint, self.keep = name, fingerprint, keep
        self.folder = SCRATCH / f"{name}-{fingerprint[:DIGITS]}"
        self.stall = 0.0
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def begin(self) -> None:
        """Go on with these states, and forget those of a finished training of that name."""
        (self.folder / FINISHED).unlink(missing_ok=True)
        forget_finished(self.name)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def save(
        self,
        nimg: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        about: dict[str, Any],
    ) -> None:
        """Begin to write the state at nimg; `about` is JSON, its "best" has the nimg to keep.

        Raises:
            OSError: the state before this one could not be written.
        """
        started = time.monotonic()
        self.wait()
        tensors = {f"{m}/{k}": v for m, net in modules.items() for k, v in net.state_dict().items()}
        for name, optimizer in optimizers.items():
            flat = flatten_optimizer(optimizer)
            tensors |= {f"optimizer.{name}/{k}": v for k, v in flat.items()}
        tensors = {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}
        about = {"fingerprint": self.fingerprint, "nimg": nimg, **about}
        self.writing = self.thread.submit(self._write, tensors, about)
        self.stall += time.monotonic() - started

    def wait(self) -> None:
        """Return when the state that is being written is whole on the disk.

        Raises:
            OSError: it could not be written; the states before it are as they were.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        about = {**about, "sha256": _sha256(tensors)}
        with atomic_path(self.folder / f"state-{about['nimg']:012d}.safetensors") as path:
            save_file(tensors, path, {"fewstep": json.dumps(about)})
        best = about.get("best") or {}
        for old in self.files()[: -self.keep]:
            if int(old.stem.split("-")[1]) != best.get("nimg"):
                old.unlink()

    def restore(
        self, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> dict[str, Any] | None:
        """Load the newest state that is whole and give what was said about it; None: no state.

        A state that cannot be read, or whose tensors are not those written, is named, left out, and
        the one before it is taken.

        Raises:
            ValueError: the state belongs to other params, data or weights.
        """
        for half_written in self.folder.rglob(".*.tmp*"):  # of states and of snapshots
            half_written.unlink(missing_ok=True)  # every rank looks
        for file in reversed(self.files()):
            try:
                tensors, about = read_safetensors(file)
                if about.get("sha256") != _sha256(tensors):
                    raise ValueError(f"need the tensors that were written, got others in {file}")
            except ValueError as error:
                print(f"{error}; falling back to the state before it", flush=True)
                continue
            if about.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"need a training state of fingerprint {self.fingerprint[:DIGITS]}, got "
                    f"{str(about.get('fingerprint'))[:DIGITS]} in {file}; remove {self.folder}"
                )
            for name, module in modules.items():
                module.load_state_dict(_under(tensors, name))
            for name, optimizer in optimizers.items():
                restore_optimizer(optimizer, _under(tensors, f"optimizer.{name}"))
            return about
        return None

    def finish(self) -> None:
        """Once the model is written, keep the newest state until somebody uses the model.

        Whoever asked for the model can die before it is noted, and ask again.
        """
        self.wait()
        for old in self.files()[:-1]:
            old.unlink()
        (self.folder / FINISHED).touch()


def forget_finished(name: str) -> None:
    """Remove the states of finished trainings of that name."""
    for mark in SCRATCH.glob(f"{name}-{'?' * DIGITS}/{FINISHED}"):
        for state in mark.parent.glob("state-*"):  # first: nothing goes on from half a folder
            state.unlink(missing_ok=True)
        shutil.rmtree(mark.parent, ignore_errors=True)  # another row of the model may be at it


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, torch.Tensor]:
    start = prefix + "/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
