"""Image files in a folder: with EDM's dataset.json, or in one subfolder per class."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fewstep.budgets import LISTING, read_small
from fewstep.data.decode import MAX_BYTES
from fewstep.data.labelled import classes_in
from fewstep.data.labels import folder_labels, is_image, listed_labels, other_pictures
from fewstep.data.stream import FileStream, fingerprint
from fewstep.data.tree import Tree, survey


@dataclass(frozen=True)
class FilePart:
    root: str
    where: str
    label: int

    def read(self) -> bytes:
        with open(os.path.join(self.root, self.where), "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("is not a regular file")
            return file.read(MAX_BYTES)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for a writer, for ever


def open_folder(path: Path, shape: tuple[int, int, int], classes: int | None) -> FileStream:
    """Image files anywhere below `path`, sorted; links are followed, hidden folders left out.

    With a dataset.json they are what EDM's tool wrote, and must have the size of the params.
    Without one they are in class folders, have any size, and are cropped and resized.

    Args:
        classes: 0 for data whose labels do not count, None for as many as there are.

    Raises:
        ValueError: no images, labels that do not fit, or links to folders that are not there.
    """
    tree = survey(path)
    _check_links(path, tree)
    named: tuple[str, ...] = ()
    names, listing = [name for name in tree.files if is_image(name)], path / "dataset.json"
    if not names:
        raise ValueError(
            f"need PNG, JPEG or WebP images below {path}, got none (params.yaml: data.source)"
        )
    if prepared := listing.is_file():
        base, each = LISTING
        text = read_small(listing, base + each * len(names), "a listing")
        labels = listed_labels(text, names, classes, str(path))
    else:
        names, labels, named = folder_labels(names, classes, str(path))
    # Sizes and times, because hashing the content would take as long as the build.
    facts = fingerprint(([name, *tree.files[name]] for name in names), labels.tolist(), shape)
    note = _note(tree)

    def part(i: int) -> FilePart:
        return FilePart(str(path), names[i], int(labels[i]))

    count = classes_in(labels) if classes is None else classes
    about = path.name, shape, labels, count, facts, note
    return FileStream(*about, part, fit=not prepared, class_names=named)


def _check_links(path: Path, tree: Tree) -> None:
    """Refuse links to nowhere that may stand for folders of images; on_error is for images."""
    for name, facts in tree.files.items():
        link = path / name
        if facts == (0, 0) and not is_image(name) and link.is_symlink() and not link.exists():
            raise ValueError(
                f"need links that lead somewhere, got {name!r} -> {str(link.readlink())!r} in "
                f"{path} (params.yaml: data.source)"
            )


def _note(tree: Tree) -> str:
    """What readers of the manifest should know of the folder."""
    told = [other_pictures(tree.files)]
    if tree.links:
        told.append(
            f"folders that are links: {len(tree.links)}, first {tree.links[0]!r}; DVC does not see "
            "edits behind them: after one, run dvc repro -f build-lmdb"
        )
    if tree.loops:
        told.append(
            f"links to a folder around them, not followed: {len(tree.loops)}, first "
            f"{tree.loops[0]!r}"
        )
    return "; ".join(filter(None, told))
