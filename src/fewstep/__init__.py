"""Reproducible distillation of EDM diffusion teachers into few-step students.

student = fewstep.load("artifacts/models/cd-8")
images = student.sample(16, labels=7)                   # uint8 (16, H, W, C)
fewstep.score(images, "artifacts/ref-stats.npz")        # {"FD-EffLite0": ...}
"""

import importlib
from typing import Any

# Found when first asked for, since torch takes 2 s to import. By name rather than by an import
# statement: this package is a part of every stage's identity, and these modules are not.
_HOMES = {
    "load": "fewstep.model",
    "Model": "fewstep.model",
    "score": "fewstep.metrics.images",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("fewstep")
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
