"""The distillation methods and the teacher's training, one file each.

Each file defines `Settings`, the method's block in params.yaml, and `build`, which makes a
`fewstep.method.Method` from the networks it needs. The method has the name of its file.
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """The names of all methods; imports none of them, since each imports torch."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The module of a method; imports torch."""
    return importlib.import_module(f"{__name__}.{name}")
