"""What a training depends on, as one hash: a state of anything else is never continued."""

import hashlib
from pathlib import Path

from fewstep.data.lmdb import ImageDataset
from fewstep.files import sha256_file
from fewstep.models import MODELS
from fewstep.params import Params, Student, digest

# what decides a training's numbers; the rest reads, writes and shows them
CODE = (
    "averages",
    "batch",
    "consistency",
    "data/batches",
    "denoiser",
    "denoising",
    "dmd2",
    "ema",
    "losses",
    "methods",
    "noise",
    "norms",
    "optimizer",
    "performance",
    "solve",
    "train",
    "unet",
)


def fingerprint(name: str, block: Student, params: Params, dataset: ImageDataset) -> str:
    """Hash of params, data, weights it starts from, and the code of the methods, 64 hex digits."""
    needed = {"teacher", block.init_from} - {None} if name != "teacher" else set()
    code = hashlib.sha256()
    for module in CODE:
        code.update((Path(__file__).parent / f"{module}.py").read_bytes())
    return digest(
        {
            "student": block,
            "network": params.network,
            "noise": params.noise,
            "precision": params.precision,
            "seed": params.seed,
            "data": dataset.content_sha256(),
            "models": {n: sha256_file(MODELS / str(n) / "model.safetensors") for n in needed},
            "code": code.hexdigest(),
        }
    )
