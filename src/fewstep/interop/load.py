"""Any network of this architecture as a denoiser: one of our models or another checkpoint."""

from pathlib import Path
from typing import Any

from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import as_denoiser
from fewstep.networks.denoiser import Denoiser
from fewstep.params import Params
from fewstep.paths import MODELS


def load(model: str, params: Params) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser called `model` in params.yaml, or in that file or folder, and its JSON.

    Nothing in the file is executed.

    Raises:
        ValueError: there is no such model, or it is another network.
    """
    folder = MODELS / model
    made = folder.is_dir() and any(folder.iterdir())  # NAME@best is empty without validation
    path = folder if made else Path(model)
    if not path.exists():
        known = ", ".join(["teacher", *params.students, *params.imports])
        raise ValueError(
            f"need a finished model ({known}) or the file or folder of a checkpoint, got {model!r}"
        )
    weights, about = import_checkpoint(path)
    return as_denoiser(weights, about, params, model), about
