"""Resumable training state: everything but the frozen teacher, one safetensors file per save.

States live in a scratch folder whose name contains a fingerprint of everything the training depends
on, so a state of other params or other data is never resumed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fewstep.distributed import Rank, gather
from fewstep.files import atomic_path, read_json, write_json
from fewstep.networks.weights import opened
from fewstep.paths import SCRATCH
from fewstep.training.fingerprint import Fingerprint
from fewstep.training.finished import DIGITS, FINISHED, forget_finished

FACTS = "fingerprint.json"  # beside the states: everything their training depends on
ALONE = Rank(0, 1, torch.device("cpu"))
SHOWN = 4  # differences to list between another training and this one


def flatten_optimizer(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors with names such as `0/exp_avg`."""
    return {
        f"{number}/{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `flatten_optimizer`; hyperparameters remain those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Checkpoints:
    """The newest states of a training, and the one with the best validation.

    A state is copied to main memory at once, and a thread writes it while training continues. That
    costs memory for one copy, and hides the seconds that hashing and writing take.

    Attributes:
        stall: seconds that training has waited for its states.
    """

    def __init__(self, name: str, fingerprint: Fingerprint, keep: int) -> None:
        self.name, self.facts, self.keep = name, fingerprint, keep
        self.fingerprint = fingerprint.digest
        self.folder = SCRATCH / f"{name}-{self.fingerprint[:DIGITS]}"
        self.stall = 0.0
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def begin(self) -> None:
        """Tidy up before this training begins or resumes; only the first rank may call it.

        On any other rank it would remove files that the first one is just writing.
        """
        for half_written in self.folder.rglob(".*.tmp*"):  # by a process that was killed
            half_written.unlink()
        (self.folder / FINISHED).unlink(missing_ok=True)
        forget_finished(self.name)
        for line in self.others():
            print(line, flush=True)
        write_json(self.folder / FACTS, self.facts.facts)

    def others(self) -> Iterator[str]:
        """If the training begins anew: lines that name states of other trainings, and why."""
        if self.files():
            return
        for file in sorted(SCRATCH.glob(f"{self.name}-{'?' * DIGITS}/{FACTS}")):
            states = sorted(file.parent.glob("state-*.safetensors"))
            if states and file.parent != self.folder:
                kimg = int(states[-1].stem.split("-")[1]) / 1000
                differ = self.facts.differences(read_json(file))
                more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
                yield (
                    f"train {self.name}: not resuming from {kimg:g} kimg in {file.parent}, which "
                    f"belongs to another training: {'; '.join(differ[:SHOWN])}{more}"
                )

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def save(
        self,
        nimg: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        about: dict[str, Any],
    ) -> None:
        """Begin to write the state at nimg.

        Args:
            about: JSON; `best.nimg` is that of the state to keep.

        Raises:
            OSError: the previous state could not be written.
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
        """Wait until the state that is being written is complete on the disk.

        Raises:
            OSError: it could not be written; earlier states are unchanged.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        about = {**about, "sha256": _sha256(tensors, tensors.__getitem__)}
        with atomic_path(self.folder / f"state-{about['nimg']:012d}.safetensors") as path:
            save_file(tensors, path, {"fewstep": json.dumps(about)})
        best = about.get("best") or {}
        for old in self.files()[: -self.keep]:
            if int(old.stem.split("-")[1]) != best.get("nimg"):
                old.unlink()

    def restore(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        rank: Rank = ALONE,
    ) -> dict[str, Any] | None:
        """Load the newest intact state and return its `about`; None if there is no state.

        One process of each node hashes it and names it to the others there, which copy one tensor
        at a time: eight that read all at once would hold 87 GB of ADM-64's DMD2.
        A state that cannot be read, or whose checksum is wrong, is reported, and the previous one
        is tried.

        Raises:
            ValueError: the state belongs to other params, data or weights.
        """
        found = self._newest_intact() if rank.local == 0 else None
        file = gather(found, rank)[rank.node]
        if file is None:
            return None
        with opened(file) as (content, about):
            if own := about.get("fingerprint") == self.fingerprint:
                _load(content, modules, optimizers)
        if not own:
            raise ValueError(
                f"need a training state of fingerprint {self.fingerprint[:DIGITS]}, got "
                f"{str(about.get('fingerprint'))[:DIGITS]} in {file}; remove {self.folder}"
            )
        return about

    def _newest_intact(self) -> Path | None:
        for file in reversed(self.files()):
            try:
                with opened(file) as (content, about):
                    intact = about.get("sha256") == _sha256(content.keys(), content.get_tensor)
                if intact:
                    return file
                raise ValueError(f"need tensors with the sha256 in {file}, got others")
            except ValueError as error:
                print(f"{error}; falling back to the state before it", flush=True)
        return None

    def finish(self) -> None:
        """After the model is written, keep only the newest state, until the model is used."""
        self.wait()
        for old in self.files()[:-1]:
            old.unlink()
        (self.folder / FINISHED).touch()


def _load(
    content: Any,  # noqa: ANN401
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
) -> None:
    """Copy the tensors of an opened state to where they belong.

    Raises:
        RuntimeError: names or shapes differ.
    """
    names = list(content.keys())
    for module, network in modules.items():
        network.load_state_dict({k: content.get_tensor(n) for k, n in _under(names, module)})
    for phase, optimizer in optimizers.items():
        device = optimizer.param_groups[0]["params"][0].device
        # moved one by one, so that main memory never holds all moments; PyTorch places the steps
        restore_optimizer(
            optimizer,
            {
                k: content.get_tensor(n).to("cpu" if k.endswith("/step") else device)
                for k, n in _under(names, f"optimizer.{phase}")
            },
        )


def _sha256(names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """Of the names and bytes of tensors, one of which is read at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensor(name).contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(names: Iterable[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Of the names that begin with the prefix, the rest and the whole."""
    start = prefix + "/"
    return ((name.removeprefix(start), name) for name in names if name.startswith(start))
