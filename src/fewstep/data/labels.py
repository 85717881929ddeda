"""Which class an image file belongs to: by `dataset.json`, or by the folder that it lies in."""

import json
from pathlib import PurePosixPath

import numpy as np

from fewstep.data.decode import FORMATS
from fewstep.data.lmdb import check_labels


def is_image(name: str) -> bool:
    """Whether a path with `/` names an image; the hidden files of macOS look like images too."""
    path = PurePosixPath(name)
    hidden = path.name.startswith(".") or path.parts[:1] == ("__MACOSX",)
    return path.suffix.lower() in FORMATS and not hidden


def listed_labels(text: bytes, names: list[str], classes: int, where: str) -> np.ndarray:
    """Labels (N,) of the images `names` by EDM's dataset.json: {"labels": [[name, label], ...]}.

    Raises:
        ValueError: not such a file, an image without a label, a label without an image, or one
            outside [0, classes).
    """
    try:
        pairs = json.loads(text)["labels"]
        known = {str(name).replace("\\", "/"): int(label) for name, label in pairs or ()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'need {{"labels": [[name, label], ...]}} in dataset.json of {where}, got {error!r} '
            "(params.yaml: data.source)"
        ) from error
    if pairs is None and classes == 1:
        return np.zeros(len(names), np.int64)
    bare = [name for name in names if name not in known]
    gone = sorted(known.keys() - set(names))
    if bare or gone:
        count, what = (len(bare), "without a label") if bare else (len(gone), "without a file")
        raise ValueError(
            f"need a file and a label for each image in {where}, got {count} {what}, first "
            f"{(bare or gone)[0]} (params.yaml: data.source)"
        )
    labels = np.array([known[name] for name in names], np.int64)
    check_labels(labels, classes, where)
    return labels


def folder_labels(names: list[str], classes: int, where: str) -> tuple[list[str], np.ndarray]:
    """The images of a tree of class folders, sorted, and their labels (N,).

    The class of `n01440764/a.png` is its first folder; where there is a folder `train`, the one
    below it, and images outside of `train` are left out. Classes count in alphabetical order.

    Raises:
        ValueError: images without a class folder, or another number of class folders.
    """
    split = [name.split("/") for name in names]
    if any("train" in parts[:-2] for parts in split):
        split = [parts for parts in split if "train" in parts[:-2]]
        found = [parts[len(parts) - parts[::-1].index("train")] for parts in split]
    else:
        found = [parts[0] if len(parts) > 1 else "" for parts in split]
    order = sorted(range(len(split)), key=lambda i: (found[i], split[i]))
    number = {name: i for i, name in enumerate(sorted(set(found)))}
    if "" in number and classes > 1:
        loose = "/".join(split[order[0]])
        raise ValueError(
            f"need each image in the folder of its class in {where}, got {loose} "
            "(params.yaml: data.source)"
        )
    if len(number) != classes:
        raise ValueError(
            f"need {classes} class folders, got {len(number)} in {where} "
            "(params.yaml: data.classes)"
        )
    labels = np.array([number[found[i]] for i in order], np.int64)
    return ["/".join(split[i]) for i in order], labels
