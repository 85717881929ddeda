"""`fewstep download-data`: data.url -> data.source, verified."""

from pathlib import Path

from fewstep.data.provide import provide
from fewstep.params import Params

HELP = "fetch and verify data.source (data.url)"


def run(params: Params) -> None:
    """Make sure that data.source exists: pipelines need their inputs on the disk to start.

    Raises:
        ValueError: it is missing and has no url, or its sha256 is wrong.
        ConnectionError: the network failed.
    """
    d = params.data
    provide(d)
    if not Path(d.source).exists():
        raise ValueError(
            f"need a file or folder at {d.source}, which you have to provide (no data.url), got "
            "nothing there (params.yaml: data.source; docs/params.md: data)"
        )
    print(f"download-data: {d.source}{f', sha256 {d.sha256[:12]}' if d.sha256 else ' is there'}")
