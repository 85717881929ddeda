"""`fewstep download-data`: data.url -> data.source, verified."""

import shutil
from pathlib import Path

from fewstep.download import fetch
from fewstep.files import atomic_path, sha256_file
from fewstep.params import Data, Params
from fewstep.stages.download_model import CACHE


def run(params: Params) -> None:
    d = params.data
    if d.url is None:
        print(f"download-data: nothing to fetch, {d.source} is yours to bring (no data.url)")
        return
    provide(d)
    print(f"download-data: {d.source}, sha256 {str(d.sha256)[:12]}")


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
            shutil.copyfile(fetch(data.url, data.sha256, CACHE), path)
    elif (got := sha256_file(source)) != data.sha256:
        raise ValueError(
            f"need sha256 {data.sha256}, got {got} of {source}; remove it to fetch it again "
            "(params.yaml: data.sha256)"
        )
