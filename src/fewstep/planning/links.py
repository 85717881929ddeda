"""Artefacts behind a link to another disk, which DVC refuses once all the work is done."""

import configparser
from collections.abc import Iterator
from pathlib import Path

from fewstep.paths import CODE, DATA, RESULTS, SETTINGS

ARTEFACTS = DATA.parent


def refused_by_dvc() -> list[str]:
    """A line for each folder of outputs that leads out of the git repository, and what works."""
    root = Path().resolve()
    repository = next((p for p in (root, *root.parents) if (p / ".git").exists()), None)
    if repository is None or _without_git():
        return []
    return [
        f"need {folder} in this repository, got a link to {folder.resolve()}, where DVC refuses "
        "outputs. Replace it by a folder, and let DVC keep the files on that disk: dvc cache dir "
        f"--local {folder.resolve() / 'dvc-cache'}; dvc config --local cache.type symlink "
        "(README.md: another disk; Snakemake takes the link)"
        for folder in _folders()
        if not folder.resolve().is_relative_to(repository)
    ]


def _folders() -> Iterator[Path]:
    """The outermost folders with outputs that are links; an output that is one is replaced."""
    for folder in (ARTEFACTS, RESULTS):
        if folder.is_symlink():
            yield folder
        elif folder.is_dir():
            written = CODE, DATA, SETTINGS
            inner = [path for path in sorted(folder.glob("*")) if path not in written]
            deeper = [path for path in sorted(folder.glob("models/*")) if path.is_dir()]
            outer = [path for path in inner if path.is_dir() and path.is_symlink()]
            yield from outer
            yield from (p for p in deeper if p.is_symlink() and p.parent not in outer)


def _without_git() -> bool:
    """Whether DVC was told to do without git (core.no_scm), and so looks at no repository."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.read([".dvc/config", ".dvc/config.local"])
    return config.getboolean("core", "no_scm", fallback=False)
