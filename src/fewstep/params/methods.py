"""The settings of a method, whose class stands in the method's own file."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from fewstep import methods
from fewstep.params.fields import Sigma, block

Problem = tuple[str, str]  # the dotted key to edit, and what is wrong


@block()
class Settings:
    """The settings of a method. Each method has its own class, with fields that are its keys."""

    needs_teacher: ClassVar[bool] = True  # one that needs none can train a teacher

    @property
    def sampling(self) -> tuple[str, int]:
        """The sampler and the number of steps that the network is trained for."""
        return "heun", 18  # EDM's own for a teacher: 35 network calls

    def grid(self, noise: Any) -> Any:  # noqa: ANN401
        """The noise levels of the student's steps, as a `Noise`, given those of the params."""
        return noise

    def sampled(self, noise: Any) -> dict[str, Any]:  # noqa: ANN401
        """How the network is to be sampled, for its JSON: sampler, steps, and levels of the grid.

        Args:
            noise: that of the params.
        """
        sampler, steps = self.sampling
        return {"sampler": sampler, "steps": steps, **vars(self.grid(noise))}

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


@block(kw_only=True)
class OwnGrid(Settings):
    """Settings of a student whose steps may have other ends than the params' `noise`."""

    sigma_max: Sigma | None = None
    """where the student's steps begin; absent = `noise.sigma_max`. At 80 the teacher's answer is
    the mean of a class for any noise, so a student of few steps begins without variance. SiD, SiDA
    and Uni-Instruct begin one-step students at 2.5"""
    sigma_min: Sigma | None = None
    """the last of the student's steps; absent = `noise.sigma_min`. One step has none"""

    def grid(self, noise: Any) -> Any:  # noqa: ANN401
        own = {"sigma_max": self.sigma_max, "sigma_min": self.sigma_min}
        return dataclasses.replace(noise, **{k: v for k, v in own.items() if v is not None})


def settings_of(method: str) -> type[Settings]:
    """The class of a method's settings. Its file imports torch.

    Raises:
        ValueError: no such method.
    """
    if method not in methods.names():
        raise ValueError(f"need a method of {', '.join(methods.names())}, got {method!r}")
    return methods.find(method).Settings
