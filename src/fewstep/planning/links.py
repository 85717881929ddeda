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
    outputs, linked = {CODE, DATA, SETTINGS}, set[Path]()
    inner = sorted({*ARTEFACTS.glob("*"), *ARTEFACTS.glob("models/*")} - outputs)
    for folder in (ARTEFACTS, RESULTS, *inner):
        if folder.is_symlink() and folder.is_dir() and not linked & set(folder.parents):
            linked.add(folder)
            yield folder


def _without_git() -> bool:
    """Whether DVC was told to do without git (core.no_scm), and so looks at no repository."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.read([".dvc/config", ".dvc/config.local"])
    return config.getboolean("core", "no_scm", fallback=False)
