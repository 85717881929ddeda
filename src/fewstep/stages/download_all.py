"""`fewstep download-all`: every file that params.yaml names, fetched before anything runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fewstep.download import CACHE, downloads, obtain
from fewstep.params import Download, Import, Params
from fewstep.stages import download_data

HELP = "fetch and verify every file of params.yaml; print each sha256 that is unknown"


def run(params: Params) -> None:
    """Fetch and verify the data, the teacher, the imports, the metric's weights and reference.

    A file that fails does not prevent the others from being fetched.

    Raises:
        ValueError: files are missing or do not match their sha256, one line each; for an unknown
            sha256, the line has the one to enter.
        ConnectionError: the network failed.
    """
    files = [partial(_fetch, key, file) for key, file in downloads(params)]
    jobs: list[Callable[[], None]] = [partial(download_data.run, params), *files]
    problems: list[str] = []
    for job in jobs:
        try:
            job()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _fetch(key: str, file: Download | Import) -> None:
    path = obtain(file, CACHE, key)
    known = f", sha256 {file.sha256[:12]}" if file.sha256 else ""
    print(f"download-all: {key}: {Path(file.url).name}{known}, in {path}")
