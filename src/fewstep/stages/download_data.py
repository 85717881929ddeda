"""`fewstep download-data`: data.url -> data.source, verified."""

import shutil
from pathlib import Path

from fewstep.download import CACHE, fetch
from fewstep.files import atomic_path, sha256_file
from fewstep.params import Data, Params


def run(params: Params) -> None:
    """Have data.source there before a pipeline starts, which wants its inputs on the disk.

    Raises:
        ValueError: it is not there, and nothing says where from; or another sha256.
        ConnectionError: the network failed.
    """
    d = params.data
    provide(d)
    if not Path(d.source).exists():
        raise ValueError(
            f"need a file or folder at {d.source}, which is yours to bring (no data.url), got "
            "nothing there (params.yaml: data.source; config/README.md: data)"
        )
    print(f"download-data: {d.source}{f', sha256 {d.sha256[:12]}' if d.sha256 else ' is there'}")


def provide(data: Data) -> None:
    """Fetch the source where the params say where from and it is not there; check it if it is.

    Raises:
        ValueError: another sha256, at the address or on the disk.
        ConnectionError: the network failed.
    """
    source = Path(data.source)
    if data.url is None or data.sha256 is None:
        return
    if not source.exists():
        with atomic_path(source) as path:
            shutil.copyfile(fetch(data.url, data.sha256, CACHE, key="data"), path)
    elif (got := sha256_file(source)) != data.sha256:
        raise ValueError(
            f"need sha256 {data.sha256}, got {got} of {source}; remove it to fetch it again "
            "(params.yaml: data.sha256)"
        )
