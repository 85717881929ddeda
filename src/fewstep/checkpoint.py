"""Resumable training state: everything but the frozen teacher, in one safetensors file a save.

It lives in a scratch folder whose name holds a fingerprint of what the training depends on, so a
state of other params or other data is never continued.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fewstep.files import atomic_path
from fewstep.models import read_safetensors

SCRATCH = Path("scratch")
KEEP = 2


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
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Checkpoints:
    """The newest states of one training, oldest removed first."""

    def __init__(self, name: str, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.folder = SCRATCH / f"{name}-{fingerprint[:12]}"

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def save(
        self,
        nimg: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        about: dict[str, Any],
    ) -> None:
        """Write the state at nimg atomically, then drop all but the newest."""
        tensors = {f"{m}/{k}": v for m, net in modules.items() for k, v in net.state_dict().items()}
        for name, optimizer in optimizers.items():
            flat = flatten_optimizer(optimizer)
            tensors |= {f"optimizer.{name}/{k}": v for k, v in flat.items()}
        tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()}
        about = {"fingerprint": self.fingerprint, "nimg": nimg, **about}
        with atomic_path(self.folder / f"state-{nimg:012d}.safetensors") as path:
            save_file(tensors, path, {"fewstep": json.dumps(about)})
        for old in self.files()[:-KEEP]:
            old.unlink()

    def restore(
        self, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> dict[str, Any] | None:
        """Load the newest state that is whole and give what was said about it; None: no state.

        A state that cannot be read is named, left out and the one before it is taken.

        Raises:
            ValueError: the state belongs to other params, data or weights.
        """
        for file in reversed(self.files()):
            try:
                tensors, about = read_safetensors(file)
            except ValueError as error:
                print(f"{error}; falling back to the state before it", flush=True)
                continue
            if about.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"need a training state of fingerprint {self.fingerprint[:12]}, got "
                    f"{str(about.get('fingerprint'))[:12]} in {file}; remove {self.folder}"
                )
            for name, module in modules.items():
                module.load_state_dict(_under(tensors, name))
            for name, optimizer in optimizers.items():
                restore_optimizer(optimizer, _under(tensors, f"optimizer.{name}"))
            return about
        return None

    def remove(self) -> None:
        """Forget all states, once the finished model is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, torch.Tensor]:
    start = prefix + "/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
