"""`fewstep download-teacher`: the teacher's weights, verified -> artifacts/models/teacher."""

from pathlib import Path

from fewstep.download import fetch
from fewstep.interop.edm_pickle import import_edm_pickle
from fewstep.models import MODELS, build_denoiser, load_weights, read_safetensors, save_model
from fewstep.params import Params
from fewstep.stages import train

CACHE = Path("scratch/downloads")


def run(params: Params) -> None:
    if params.teacher.train is not None:
        train.run(params, "teacher")
        return
    url, sha256 = str(params.teacher.url), str(params.teacher.sha256)
    file = fetch(url, sha256, CACHE)
    read = import_edm_pickle if url.endswith(".pkl") else read_safetensors
    weights, about = read(file)
    load_weights(build_denoiser(params), weights, url)
    save_model(MODELS / "teacher", weights, {**about, "name": "teacher", "sha256": sha256})
    print(f"download-teacher: {len(weights)} tensors, sha256 {sha256[:12]}, from {url}")
