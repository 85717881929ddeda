"""A downloaded network as one of our models."""

from fewstep.download import CACHE, obtain
from fewstep.files import atomic_path
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.interop.verify import verify
from fewstep.networks.weights import save_model
from fewstep.params import Download, Import, Params
from fewstep.paths import MODELS, SNAPSHOTS


def install(name: str, file: Import | Download, params: Params) -> None:
    """Download, verify and save a model; what its file says of method, steps and kimg stays.

    Its log and snapshots are empty: they are outputs of the stage, but we did not train it.

    Raises:
        ValueError: another sha256, or weights that do not fit params.network.
        ConnectionError: the network failed.
    """
    key = "teacher" if name == "teacher" else f"imports.{name}"
    network = file.network if isinstance(file, Import) else None
    weights, about = import_checkpoint(obtain(file, CACHE, key), network)
    if file.sha256 not in (None, about["sha256"]):  # of a folder; a file's was compared
        raise ValueError(
            f"need sha256 {file.sha256}, got {about['sha256']} of the checkpoint in {file.url} "
            f"(params.yaml: {key}.sha256)"
        )
    found = verify(weights, about, params, file.url)
    save_model(MODELS / name, weights, {**about, "name": name})
    with atomic_path(MODELS / name / "log.jsonl") as path:
        path.touch()
    (SNAPSHOTS / name).mkdir(parents=True, exist_ok=True)
    print(f"{name}: {len(weights)} tensors, sha256 {about['sha256'][:12]}, from {file.url}")
    print(f"{name}: {found}")
