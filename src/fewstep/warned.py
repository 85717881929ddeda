"""Warnings of a command: each once, after its results, where they are read."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

FIRST_RANK = "0"
_found: dict[str, None] = {}


@contextmanager
def at_the_end() -> Iterator[None]:
    """Print each distinct warning at the end on stderr, without the line of code that raised it.

    Of several processes the first one prints, as all of them warn of the same.
    """
    _found.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _found.setdefault(str(message))
        try:
            yield
        finally:
            if os.environ.get("RANK", FIRST_RANK) == FIRST_RANK:
                for text in _found:
                    print(f"warning: {text}", file=sys.stderr, flush=True)
            _found.clear()


def left_to_workers() -> None:
    """Forget what was found so far: this process becomes a launch, whose workers find it again."""
    _found.clear()
