"""Classes by their names, where the data or the model has some."""

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.data.lmdb import ImageDataset
from fewstep.params.problems import did_you_mean
from fewstep.paths import DATA
from fewstep.quoting import quoted
from fewstep.sampling.numbers import parse


def class_names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a model's classes: from its JSON, else from our data; () if there are none.

    Args:
        about: the JSON. A downloaded model has no names; our data's are then meant.
    """
    if names := about.get("data", {}).get("class_names"):
        return tuple(map(str, names))
    try:
        return ImageDataset(DATA).class_names
    except ValueError:  # no data here
        return ()


def chosen_classes(text: str, names: Sequence[str]) -> list[int]:
    """The classes in a list such as `T-shirt,Coat` or `0-9,20`, or both.

    Args:
        names: of the classes; small and capital letters are the same.

    Raises:
        ValueError: neither a name nor a number.
    """
    known = {name.casefold(): index for index, name in enumerate(names)}
    if (whole := text.strip().casefold()) in known:  # a name may have a comma in it
        return [known[whole]]
    chosen: list[int] = []
    for part in text.split(","):
        word = part.strip().casefold()
        if word in known:
            chosen.append(known[word])
        elif names and not word[:1].isdecimal():
            hint = did_you_mean(part.strip(), names)
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"need --classes of {shown}, or numbers, got {quoted(part)}{hint}")
        else:
            chosen += parse(part, "--classes")
    return chosen
