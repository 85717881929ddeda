"""`fewstep download-teacher`: the teacher's weights, verified -> artifacts/models/teacher."""

from pathlib import Path

from fewstep.download import fetch
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.models import MODELS, save_model
from fewstep.params import Params
from fewstep.stages import train
from fewstep.stages.import_checkpoint import verify

CACHE = Path("scratch/downloads")


def run(params: Params) -> None:
    if params.teacher.train is not None:
        train.run(params, "teacher")
        return
    url, sha256 = str(params.teacher.url), str(params.teacher.sha256)
    weights, about = import_checkpoint(fetch(url, sha256, CACHE))
    verify(weights, about, params, url)
    save_model(MODELS / "teacher", weights, {**about, "name": "teacher", "sha256": sha256})
    print(f"download-teacher: {len(weights)} tensors, sha256 {sha256[:12]}, from {url}")
