"""`fewstep download-all`: every file that params.yaml names, fetched before anything runs."""

from collections.abc import Callable
from pathlib import Path

from fewstep.download import CACHE, downloads, fetch
from fewstep.params import Download, Params
from fewstep.stages import download_data


def run(params: Params) -> None:
    """Fetch and verify the data, the teacher, the imports, the metric's weights and reference.

    What fails does not keep the others from being fetched.

    Raises:
        ValueError: all that is missing or not what its sha256 says, a line each; of files whose
            sha256 is unknown the one that they have.
        ConnectionError: the network failed.
    """
    problems = [*_problems(lambda: download_data.run(params))]
    for key, file in downloads(params):
        problems += _problems(lambda key=key, file=file: _fetch(key, file))
    if problems:
        raise ValueError("\n".join(problems))


def _fetch(key: str, file: Download) -> None:
    path = fetch(file.url, file.sha256, CACHE, key=key)
    print(f"download-all: {key}: {Path(file.url).name}, sha256 {file.sha256[:12]}, in {path}")


def _problems(work: Callable[[], None]) -> list[str]:
    try:
        work()
    except ValueError as error:
        return [str(error)]
    return []
