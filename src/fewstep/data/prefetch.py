"""Reads the next batch while the current one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Rows = TypeVar("Rows")


class Prefetch(Generic[Rows]):
    """`read(place)` one place ahead, in a thread; what is returned depends on the place alone."""

    def __init__(self, read: Callable[[int], Rows]) -> None:
        self.read, self.thread = read, ThreadPoolExecutor(1, "prefetch")
        self.ahead: tuple[int, Future[Rows]] | None = None

    def __call__(self, place: int, following: int | None) -> Rows:
        """What is at `place`; the reading of what follows, if anything does, begins.

        Raises:
            Exception: what `read` raised.
        """
        ahead = self.ahead
        rows = ahead[1].result() if ahead and ahead[0] == place else self.read(place)
        if following is not None:
            self.ahead = following, self.thread.submit(self.read, following)
        return rows
