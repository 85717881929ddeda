"""Validations that get worse and worse: the sign that a training should have ended before."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fewstep.paths import BEST
from fewstep.training.signs import SIGNS

Scores = Sequence[tuple[int, float]]
"""nimg and distance of each validation, in order."""
OTHERS = r"validation/(?:teacher|real)_"
"""How names begin of what a student's validation is compared with."""
DISTANCE = rf"(?!{OTHERS}|validation/(?:{'|'.join(SIGNS)})$)validation/"
"""How the name of a student's own distance begins."""
PATIENCE = 3  # worsenings in a row


def scores_in(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The validations in the rows of a log."""
    return [
        (row["nimg"], value)
        for row in rows
        for name, value in row.items()
        if re.match(DISTANCE, name)
    ]


def worsened(name: str, scores: Scores) -> str | None:
    """A warning if the last score is the third in a row that is worse than the one before it."""
    values = [value for _, value in scores]
    worse = [after > before for before, after in itertools.pairwise(values)]
    if worse[-PATIENCE:] != [True] * PATIENCE or worse[-PATIENCE - 1 :][:-PATIENCE] == [True]:
        return None
    nimg, value = scores[-PATIENCE - 1]
    best, lowest = min(scores, key=lambda score: score[1])
    of = "of that time" if best == nimg else f"of {best / 1000:g} kimg, {lowest:.4g},"
    return (
        f"{name}: validation has worsened three times in a row since {nimg / 1000:g} kimg, where "
        f"it was {value:.4g}; a row may draw the model {of} as model: {name}{BEST}"
    )


def worsenings(name: str, scores: Scores) -> list[str]:
    """All warnings of a training but those that a new best score has outdated."""
    parts = [scores[: n + 1] for n in range(len(scores))]
    lowest = min((value for _, value in scores), default=0.0)
    found = (worsened(name, part) for part in parts if min(v for _, v in part) == lowest)
    return [text for text in found if text]
