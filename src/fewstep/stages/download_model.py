"""`fewstep download-model NAME`: a network of params.yaml: imports -> artifacts/models/NAME."""

from fewstep.averages import SNAPSHOTS
from fewstep.download import CACHE, fetch
from fewstep.files import atomic_path
from fewstep.interop.checkpoint import import_checkpoint
from fewstep.models import MODELS, save_model
from fewstep.params import Params
from fewstep.stages.import_checkpoint import verify


def run(params: Params, name: str) -> None:
    """Download an import.

    Raises:
        ValueError: no such import, another sha256, or weights that do not fit params.network.
    """
    if name not in params.imports:
        known = ", ".join(params.imports) or "none"
        raise ValueError(f"need an import of: {known}, got {name!r} (params.yaml: imports)")
    install(name, params.imports[name].url, params.imports[name].sha256, params)


def install(name: str, url: str, sha256: str, params: Params) -> None:
    """Fetch, verify and write a model; its log and snapshots are empty, for we did not train it."""
    key = "teacher" if name == "teacher" else f"imports.{name}"
    weights, about = import_checkpoint(fetch(url, sha256, CACHE, key=key))
    verify(weights, about, params, url)
    save_model(MODELS / name, weights, {**about, "name": name, "sha256": sha256})
    with atomic_path(MODELS / name / "log.jsonl") as path:
        path.touch()
    (SNAPSHOTS / name).mkdir(parents=True, exist_ok=True)
    print(f"{name}: {len(weights)} tensors, sha256 {sha256[:12]}, from {url}")
