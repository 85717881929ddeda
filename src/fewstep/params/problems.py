"""What is wrong with a params file: collected first, told all at once, one problem a line."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from fewstep.quoting import plain, printable

KeyPath = tuple[Any, ...]


class ParamsError(ValueError):
    """Every problem of a params file, one a line."""


class Report:
    """Collects problems, and remembers where they are.

    Paths are those of the merged params. `home` says where in the file the value at a path stands,
    which is elsewhere for what a student takes from `training`.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: list[str] = []
        self.home: Callable[[KeyPath], KeyPath] = lambda path: path
        self._paths: list[KeyPath] = []

    def refuse(self, path: KeyPath, message: str, at: KeyPath | None = None) -> None:
        """A value at `path` that is wrong on its own; the line shows `at` instead, if given."""
        self._paths.append(path)
        if self.home(path) == path:  # else the check of `training` itself says so, once
            self._add(message, dotted(path if at is None else at))

    def conflict(self, path: KeyPath | str, message: str) -> None:
        """A value that is wrong beside another one; `path` is the key to edit."""
        self._add(message, path if isinstance(path, str) else dotted(self.home(path)))

    def _add(self, message: str, key: str) -> None:
        """The one form of all messages: what is needed, what came, and the key to edit."""
        self.lines.append(f"{message} ({': '.join(filter(None, (self.file, key)))})")

    def sound(self, *path: str) -> bool:
        """Whether nothing on the way to, at or below `path` was refused."""
        return not any(p[: len(path)] == path[: len(p)] for p in self._paths)

    def stop(self) -> None:
        """Raise the problems, if there are any.

        Raises:
            ParamsError: all of them, each once.
        """
        if self.lines:
            raise ParamsError("\n".join(dict.fromkeys(self.lines)))


def dotted(path: Iterable[Any]) -> str:
    """A path of keys and list positions as messages show it: `students.cd.betas[0]`."""
    parts = (f"[{key}]" if type(key) is int else f".{plain(str(key))}" for key in path)
    return "".join(parts).lstrip(".")


def show(value: object, rule: Mapping[str, Any] = MappingProxyType({})) -> str:
    """`value` as a message quotes it; says that it is a string where `rule` asks for none."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    odd = isinstance(value, str) and rule.get("type", "string") != "string"
    shown = printable(reprlib.repr(value), keep="")
    return f"the string {shown}" if odd else shown


def nearest(key: object, known: Iterable[str]) -> str | None:
    """The known name most like `key`; its initials come first (lr for learning_rate)."""
    text = str(key)
    initials = "".join(word[:1] for word in re.split("[_. -]", text))
    if initials in (known := list(known)):
        return initials
    return next(iter(difflib.get_close_matches(text, known, n=1, cutoff=0.5)), None)


def did_you_mean(key: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    like = nearest(key, known)
    return f"; did you mean '{like}'?" if like else ""
