"""The class of an image file: from `dataset.json`, or from the folder that contains it."""

import os
from collections import Counter
from collections.abc import Iterable

import numpy as np

from fewstep.budgets import LISTING, read_json
from fewstep.data.decode import FORMATS
from fewstep.data.tree import is_hidden
from fewstep.quoting import plain, quoted

_UNREAD = set(
    ".apng .avif .bmp .dng .gif .heic .heif .jfif .jp2 .jxl .pgm .pnm .ppm .tga .tif .tiff".split()
)
_LISTED = 12  # class folders that a message names


def is_image(name: str) -> bool:
    """Whether a path with `/` names an image that is not hidden nor in a hidden folder."""
    return _suffix(name) in FORMATS and not any(map(is_hidden, name.split("/")))


def other_pictures(names: Iterable[str]) -> str:
    """A note on pictures of formats that are not read; "" if there are none."""
    suffixes = Counter(_suffix(name) for name in names if not any(map(is_hidden, name.split("/"))))
    left = [f"{suffixes[s]} {s}" for s in sorted(suffixes) if s in _UNREAD]
    return f"left out, as no PNG, JPEG or WebP: {', '.join(left)}" if left else ""


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # pathlib takes seconds for a million names


def listed_labels(text: bytes, names: list[str], classes: int | None, where: str) -> np.ndarray:
    """Labels (N,) of the images `names` in EDM's dataset.json: {"labels": [[name, label], ...]}.

    Args:
        classes: 0 for data whose labels do not count, None for as many as there are.

    Raises:
        ValueError: another kind of file, an image without a label, a label without an image, or a
            label outside [0, classes).
    """
    try:
        base, each = LISTING
        most = base + each * len(names)
        pairs = read_json(text, most, "dataset.json", objects=1000 + 2 * len(names))["labels"]
        known = {str(name).replace("\\", "/"): int(label) for name, label in pairs or ()}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f'need {{"labels": [[name, label], ...]}} in dataset.json of {where}, got '
            f"{plain(repr(error), 200)} (params.yaml: data.source)"
        ) from error
    if pairs is None and (classes or 0) <= 1:  # EDM's tool writes null for data without labels
        return np.zeros(len(names), np.int64)
    bare = [name for name in names if name not in known]
    gone = sorted(known.keys() - set(names))
    if bare or gone:
        count, what = (len(bare), "without a label") if bare else (len(gone), "without a file")
        raise ValueError(
            f"need a file and a label for each image in {where}, got {count} {what}, first "
            f"{plain((bare or gone)[0], 200)} (params.yaml: data.source)"
        )
    above = classes or np.inf
    if wrong := next((name for name in names if not 0 <= known[name] < above), None):
        raise ValueError(
            f"need labels in [0, {above}), got {quoted(known[wrong])} at {plain(wrong, 200)} in "
            f"{where} (params.yaml: data.classes)"
        )
    return np.array([known[name] for name in names], np.int64)


def folder_labels(
    names: list[str], classes: int | None, where: str
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """The images in a tree of class folders, sorted, their labels (N,), and the classes' names.

    The class of `n01440764/a.png` is its first folder. If there is a folder `train`, the class is
    the folder below it, and images outside `train` are left out. Classes are numbered in
    alphabetical order. Images that are all in no folder are one class without a name.

    Args:
        classes: 0 for data whose labels do not count, None for as many as there are.

    Raises:
        ValueError: images without a class folder, or another number of class folders.
    """
    split = [name.split("/") for name in names]
    # [:-2], because below `train` there must be a class folder and a file
    if any("train" in parts[:-2] for parts in split):
        split = [parts for parts in split if "train" in parts[:-2]]
        found = [parts[len(parts) - parts[::-1].index("train")] for parts in split]
    else:
        found = [parts[0] if len(parts) > 1 else "" for parts in split]
    order = sorted(range(len(split)), key=lambda i: (found[i], split[i]))
    number = {name: i for i, name in enumerate(sorted(set(found)))}
    if "" in number and (len(number) if classes is None else classes) > 1:
        loose = "/".join(split[order[0]])
        raise ValueError(
            f"need each image in the folder of its class in {where}, got {plain(loose, 200)} "
            "(params.yaml: data.source)"
        )
    if classes and len(number) != classes:
        raise ValueError(
            f"need {classes} class folders, got {len(number)} in {where}: {_listed(found)} "
            "(params.yaml: data.classes)"
        )
    labels = np.array([number[found[i]] for i in order], np.int64)
    named = tuple(number) if classes != 0 and "" not in number else ()
    return ["/".join(split[i]) for i in order], labels, named


def _listed(found: list[str]) -> str:
    """The class folders, each with its number of images, as a terminal can show them."""
    counts = sorted(Counter(found).items())
    shown = ", ".join(f"{name[:40]!r} ({count})" for name, count in counts[:_LISTED])
    more = len(counts) - _LISTED
    return f"{shown} and {more} more" if more > 0 else shown
