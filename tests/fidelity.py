"""Modules of torch-fidelity, which ours are compared with, without torchvision.

It imports torchvision all over, which does not import with every torch.
"""

import sys
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def fidelity_module(name: str) -> Any:  # noqa: ANN401
    """torch_fidelity.`name`, with an empty package, utils and torchvision around it."""
    spec = find_spec("torch_fidelity")
    assert spec is not None and spec.origin is not None
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(Path(spec.origin).parent)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        for empty in ("torch_fidelity.utils", "torchvision"):
            patch.setitem(sys.modules, empty, _Empty(empty))
        return import_module(f"torch_fidelity.{name}")
