"""The settings of a method, whose class stands in the method's own file."""

from collections.abc import Iterator
from typing import ClassVar

from fewstep import methods
from fewstep.params.fields import block

Problem = tuple[str, str]  # the dotted key to edit, and what is wrong


@block()
class Settings:
    """The settings of a method. Each method has its own class, with fields that are its keys."""

    needs_teacher: ClassVar[bool] = True  # one that needs none can train a teacher

    @property
    def sampling(self) -> tuple[str, int]:
        """The sampler and the number of steps that the network is trained for."""
        return "heun", 18  # EDM's own for a teacher: 35 network calls

    @property
    def trains_unconditional(self) -> bool:
        """Whether the student sees images without labels, as guidance needs."""
        return False

    def check(self, at: str) -> Iterator[Problem]:
        """Settings that conflict with one another; `at` is where they stand."""
        yield from ()

    def check_origin(self, name: str, model: str, origin: "Settings | None") -> Iterator[Problem]:
        """Settings that conflict with what the student of this name starts from.

        Args:
            model: what it starts from.
            origin: the settings of that, if it is a student.
        """
        yield from ()


def settings_of(method: str) -> type[Settings]:
    """The class of a method's settings. Its file imports torch.

    Raises:
        ValueError: no such method.
    """
    if method not in methods.names():
        raise ValueError(f"need a method of {', '.join(methods.names())}, got {method!r}")
    return methods.find(method).Settings
