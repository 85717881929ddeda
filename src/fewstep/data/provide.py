"""data.source on the disk, downloaded if the params give its URL."""

import shutil
from pathlib import Path

from fewstep.download import CACHE, fetch
from fewstep.files import atomic_path, sha256_file
from fewstep.params import Data


def provide(data: Data) -> None:
    """Download the source if it is missing and the params give its URL; if it is there, check it.

    Raises:
        ValueError: another sha256, at the URL or on the disk.
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
            f"need sha256 {data.sha256}, got {got} of {source}; remove it to download it again "
            "(params.yaml: data.sha256)"
        )
