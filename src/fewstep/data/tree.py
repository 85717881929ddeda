"""All files below a folder, through links, without the folders that programs leave behind."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

# Thumbnails, previews and deleted files, which look like one class more.
_LEFT_BEHIND = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}
_Identity = tuple[int, int]  # device and inode
_LINKS = 100_000  # folders behind links: n folders that link to each other unfold to n! paths


@dataclass
class Tree:
    """What is below a folder.

    Attributes:
        files: size and modification time in ns of each file, by its path with `/`, sorted; (0, 0)
            for a link that leads nowhere.
        links: folders that are links, and were followed.
        loops: links back to a folder around them, which were not.
        newest: time in ns of the last change of a file or folder.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    newest: int = 0


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not for people who look at the images."""
    return (name.startswith(".") and name.strip(".") != "") or name.lower() in _LEFT_BEHIND


def survey(root: Path) -> Tree:
    """All files below `root`, but for hidden ones. One stat each: about 10 s for ImageNet.

    A folder is entered as often as it is shown, unless it is one of those around itself.

    Raises:
        ValueError: a folder that cannot be read, or links that unfold without end.
    """
    top = os.stat(root)
    tree, found = Tree(newest=top.st_mtime_ns), dict[str, tuple[int, int]]()
    waiting: list[tuple[str, tuple[_Identity, ...]]] = [("", (_identity(top),))]
    while waiting:
        prefix, around = waiting.pop()
        for entry in _entries(root, prefix):
            name, status = prefix + entry.name, _status(entry)
            tree.newest = max(tree.newest, status.st_mtime_ns if status else 0)
            if status is None or not stat.S_ISDIR(status.st_mode):
                found[name] = (status.st_size, status.st_mtime_ns) if status else (0, 0)
                continue
            if entry.is_symlink():
                tree.links.append(name)
            if (own := _identity(status)) in around:
                tree.loops.append(name)
            else:
                waiting.append((f"{name}/", (*around, own)))
        if len(tree.links) > _LINKS:
            raise ValueError(
                f"need at most {_LINKS} folders behind links below {root}, got more; do they lead "
                "to each other? (params.yaml: data.source)"
            )
    files = dict(sorted(found.items()))
    return Tree(files, sorted(tree.links), sorted(tree.loops), tree.newest)


def _entries(root: Path, prefix: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / prefix) as entries:  # pathlib would make a million objects
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise ValueError(
            f"need folders that can be read, got {prefix!r} in {root}: {error.strerror} "
            "(params.yaml: data.source)"
        ) from error


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of what an entry leads to; None if that is nowhere."""
    try:
        return entry.stat()
    except OSError:
        return None


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino
