"""Students for other programs, one format a file.

Each file defines `SUFFIX`, of a file ("" for a folder), and `write(order, path)`.
The format has the name of its file; a new one is a file here.
"""

import importlib
import re
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def names() -> tuple[str, ...]:
    """All formats, sorted. Reads text and imports nothing: torch alone takes 2 s."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(f.stem for f in files if re.search(r"^def write\(", f.read_text(), re.M)))


def find(name: str) -> ModuleType:
    """The module of a format.

    Raises:
        ValueError: no such format.
    """
    if name not in names():
        raise ValueError(f"need a format of {', '.join(names())}, got {name!r} (--to)")
    return importlib.import_module(f"{__name__}.{name}")


def needed(package: str) -> ModuleType:
    """A package of the extra `fewstep[export]`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"need {package}, which is not installed: pip install 'fewstep[export]'"
        ) from error
