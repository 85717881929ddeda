"""`fewstep download-model NAME`: an import of params.yaml -> artifacts/models/NAME."""

from fewstep.interop.install import install
from fewstep.params import Params

HELP = "fetch and verify another network (imports)"
NAME = "a network of params.yaml: imports"


def run(params: Params, name: str) -> None:
    """Download an import.

    Raises:
        ValueError: no such import, a wrong sha256, or weights that do not fit params.network.
    """
    if name not in params.imports:
        known = ", ".join(params.imports) or "none"
        raise ValueError(f"need an import of: {known}, got {name!r} (params.yaml: imports)")
    install(name, params.imports[name], params)
