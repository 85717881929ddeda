"""Progress with rate and time left: a tqdm bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Self, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

QUIET = 2.0  # seconds; what ends sooner prints nothing
EVERY = 10.0  # seconds between plain lines


def progress(
    work: Iterable[T] | int | None,
    desc: str,
    unit: str = "images",
    *,
    total: int | None = None,
    initial: int = 0,
    silent: bool = False,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> "Progress[T]":
    """Show how far `work` is, on stderr: `build-lmdb: 20000/50000 images, 8123/s, 4 s left`.

    Iterate over the result, or advance it by hand:

        with progress(kimg * 1000, "train", initial=nimg) as bar:
            bar.update(64, f"loss {loss:.3f}")

    Args:
        work: what to iterate over, or the number of units (None: unknown).
        unit: plural noun; "B" means bytes, printed as MB.
        total: units in all, when `work` is an iterable without a length.
        initial: units done before, by an interrupted run; left out of the rate.
        silent: print nothing, for ranks other than 0.
    """
    if work is None or isinstance(work, int):
        return Progress((), work, desc, unit, initial, silent, stream or sys.stderr, clock)
    if total is None and isinstance(work, Sized):
        total = len(work)
    return Progress(work, total, desc, unit, initial, silent, stream or sys.stderr, clock)


class Progress(Iterable[T]):
    """What `progress` returns: an iterable, and a context manager with `update`."""

    def __init__(
        self,
        items: Iterable[T],
        total: int | None,
        desc: str,
        unit: str,
        initial: int,
        silent: bool,
        stream: TextIO,
        clock: Callable[[], float],
    ) -> None:
        self.n = initial
        self._items, self._total, self._desc, self._unit = items, total, desc, unit
        self._initial, self._silent, self._stream, self._clock = initial, silent, stream, clock
        self._postfix = ""
        self._start = clock()
        self._next_line = self._start + QUIET
        self._bar: tqdm | None = None
        if not silent and stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=desc,
                initial=initial,
                unit="B" if unit == "B" else f" {unit}",
                unit_scale=unit == "B",
                file=stream,
                delay=QUIET,
                dynamic_ncols=True,
            )

    def update(self, n: int = 1, postfix: str = "") -> None:
        """Count `n` more units; `postfix` (a loss, say) replaces the text behind the line."""
        self.n += n
        self._postfix = postfix or self._postfix
        if self._bar is not None:
            if postfix:
                self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(n)
        elif not self._silent and (now := self._clock()) >= self._next_line:
            self._next_line = now + EVERY
            self._print(now, finished=False)

    def close(self) -> None:
        """Print the last state, if the work took longer than two seconds."""
        now = self._clock()
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and now - self._start >= QUIET:
            self._print(now, finished=True)
        self._silent, self._bar = True, None

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, now: float, finished: bool) -> None:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.n - self._initial) / elapsed
        scale, unit = (1e-6, "MB") if self._unit == "B" else (1, self._unit)
        count = _number(self.n * scale)
        if self._total is not None:
            count += f"/{_number(self._total * scale)}"
        speed = f"{_number(rate * scale)}{' MB' if unit == 'MB' else ''}/s"
        parts = [f"{self._desc}: {count} {unit}", speed]
        if finished:
            parts.append(f"{_duration(elapsed)} in all")
        elif self._total is not None and rate > 0:
            parts.append(f"{_duration(max(self._total - self.n, 0) / rate)} left")
        if self._postfix:
            parts.append(self._postfix)
        print(", ".join(parts), file=self._stream, flush=True)


def _number(value: float) -> str:
    """Whole numbers and large ones without decimals, small ones with three digits."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
