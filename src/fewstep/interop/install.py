"""A downloaded network as one of our models."""

from fewstep.download import CACHE, fetch
from fewstep.files import atomic_path
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import verify
from fewstep.networks.weights import save_model
from fewstep.params import Download, Params
from fewstep.paths import MODELS, SNAPSHOTS


def install(name: str, file: Download, params: Params) -> None:
    """Download, verify and save a model.

    Its log and snapshots are empty: they are outputs of the stage, but we did not train it.

    Raises:
        ValueError: another sha256, or weights that do not fit params.network.
        ConnectionError: the network failed.
    """
    key = "teacher" if name == "teacher" else f"imports.{name}"
    weights, about = import_checkpoint(fetch(file.url, file.sha256, CACHE, key=key))
    found = verify(weights, about, params, file.url)
    save_model(MODELS / name, weights, {**about, "name": name, "sha256": file.sha256})
    with atomic_path(MODELS / name / "log.jsonl") as path:
        path.touch()
    (SNAPSHOTS / name).mkdir(parents=True, exist_ok=True)
    print(f"{name}: {len(weights)} tensors, sha256 {file.sha256[:12]}, from {file.url}")
    print(f"{name}: {found}")
